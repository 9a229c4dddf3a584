"""`dryvine eval` as typed, against figures worked out from the training forward."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dryvine.launch.cli import app, main
from dryvine.trainer.data.atomic import CannotWrite
from dryvine.trainer.generate.dialogue import document, plain
from dryvine.trainer.generate.open import load, open_weights
from dryvine.trainer.hand_off.encodings import Encoding
from dryvine.trainer.hand_off.export_hf import export_hf
from dryvine.trainer.rl.verifiers import names
from tests.support.commands import invoke
from tests.support.generate import training_forward
from tests.support.hand_off import quiet, run_of, small, tokenizer_of

TEXTS = ["def f(x):\n    return x\n", "x = 1", "return " * 30]  # the last one longer than the model's 64 positions


def jsonl(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def rows_of(*words: str) -> list[dict[str, Any]]:
    code, said = invoke("eval", *words, "--json")
    assert code == 0
    return [json.loads(line) for line in said.splitlines()]


def logprobs(folder: Path, tokens: tuple[int, ...]) -> torch.Tensor:
    """Of every token but the first."""
    model = load(open_weights(str(folder)), torch.float32, torch.device("cpu"), quiet)
    found = training_forward(model, tokens[:-1])[0]
    return found.gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1).double()


def test_perplexity_is_that_of_the_training_forward(tmp_path: Path) -> None:
    run = run_of(small(), tmp_path / "run")
    file = jsonl(tmp_path / "texts.jsonl", *({"text": text} for text in TEXTS[:2]))
    (row,) = rows_of(str(tmp_path / "run"), "--tasks", file)
    losses = [-logprobs(tmp_path / "run", document(tokenizer_of(run).vocabulary, text)) for text in TEXTS[:2]]
    loss = float(torch.cat(losses).mean())
    figures = row["figures"]
    assert figures["loss"]["value"] == pytest.approx(loss, abs=1e-5)
    assert figures["perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-5)
    bits = float(torch.cat(losses).sum()) / math.log(2) / sum(map(len, TEXTS[:2]))
    assert figures["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    assert figures["loss"]["low"] < loss < figures["loss"]["high"]
    assert (row["task"], row["step"], row["lines"]) == ("texts", 0, 2)


def test_a_text_longer_than_the_model_is_scored_once_behind_half_a_window(tmp_path: Path) -> None:
    run = run_of(small(), tmp_path / "run")
    tokens = document(tokenizer_of(run).vocabulary, TEXTS[2])
    assert len(tokens) > 64
    file, answers = jsonl(tmp_path / "long.jsonl", {"text": TEXTS[2]}), tmp_path / "answers.jsonl"
    rows_of(str(tmp_path / "run"), "--tasks", file, "--context", "16", "--answers", str(answers))
    first = -logprobs(tmp_path / "run", tokens[:17])
    rest = []
    for done in range(17, len(tokens), 8):
        end = min(len(tokens), done + 8)
        rest.append(-logprobs(tmp_path / "run", tokens[end - 17 : end])[done - end :])
    said = json.loads(answers.read_text())
    assert said["tokens"] == len(tokens) - 1
    assert said["loss"] == pytest.approx(float(torch.cat([first, *rest]).mean()), abs=1e-5)


def test_choices_are_ranked_by_their_log_probability(tmp_path: Path) -> None:
    run = run_of(small(), tmp_path / "run")
    vocabulary = tokenizer_of(run).vocabulary
    prompt, choices = "def f(x):\n" * 2, [" return", " x", "zzz zzz", " x"]
    records = [{"prompt": prompt, "choices": choices, "answer": answer} for answer in (0, "zzz zzz", 1, 3)]
    answers = tmp_path / "answers.jsonl"
    (row,) = rows_of(str(tmp_path / "run"), jsonl(tmp_path / "mc.jsonl", *records), "--answers", str(answers))
    sums = [
        float(logprobs(tmp_path / "run", (vocabulary.end, *plain(vocabulary, prompt + text)))[-n:].sum())
        for text in choices
        if (n := len(plain(vocabulary, text)))
    ]
    said = [json.loads(line) for line in answers.read_text().splitlines()]
    assert said[0]["logprobs"] == pytest.approx(sums, abs=1e-4)
    best = choices[sums.index(max(sums))]  # " x": twice among the choices, whose sums can differ in rounding
    assert [line["right"] for line in said] == [text == best for text in (" return", "zzz zzz", " x", " x")]
    assert row["figures"]["accuracy"]["value"] == pytest.approx(sum(line["right"] for line in said) / 4)


def test_an_exact_match_is_the_best_answer_up_to_its_end(tmp_path: Path) -> None:
    run_of(small(), tmp_path / "run")
    words = (str(tmp_path / "run"), "def f", "--max-tokens", "12", "--temperature", "0")
    text = invoke("generate", *words)[1].removeprefix("def f").removesuffix("\n")
    end = text[4:6]
    records = [
        {"prompt": "def f", "answer": ["never", text], "until": ["\x00"], "max_tokens": 12},
        {"prompt": "def f", "answer": text.split(end)[0], "until": end},
        {"prompt": "def f", "answer": text + "!", "until": ["\x00"], "max_tokens": 12},
    ]
    answers = tmp_path / "answers.jsonl"
    (row,) = rows_of(str(tmp_path / "run"), jsonl(tmp_path / "m.jsonl", *records), "--answers", str(answers))
    said = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["right"] for line in said] == [True, True, False]
    assert row["figures"]["exact_match"]["value"] == pytest.approx(2 / 3)


def test_pass_at_k_is_judged_by_a_verifier(tmp_path: Path) -> None:
    run_of(small(), tmp_path / "run")
    records = [{"prompt": "def f", "verifier": "length", "max_tokens": 3, "overlong_buffer": 1} for _ in range(2)]
    file, answers = jsonl(tmp_path / "p.jsonl", *records), tmp_path / "answers.jsonl"
    words = (str(tmp_path / "run"), "--tasks", file, "--samples", "4", "--answers", str(answers))
    (row,) = rows_of(*words)
    said = [json.loads(line) for line in answers.read_text().splitlines()]
    assert all(len(line["texts"]) == len(line["scores"]) == 5 for line in said)
    assert set(row["figures"]) == {"greedy", "pass@1", "pass@4", "unscored"}
    right = [[score >= 1 for score in line["scores"]] for line in said]
    assert row["figures"]["pass@1"]["value"] == pytest.approx(sum(sum(some[1:]) for some in right) / 8)
    assert row["figures"]["pass@4"]["value"] == sum(any(some[1:]) for some in right) / 2
    assert rows_of(*words) == [row]


def test_answers_that_cannot_be_scored_are_told_with_the_reason(tmp_path: Path) -> None:
    """They count as wrong, and the model may be right."""
    run_of(small(), tmp_path / "run")
    records = [{"prompt": "def f", "verifier": name, "max_tokens": 3} for name in ("countdown", "format")]
    file, answers = jsonl(tmp_path / "p.jsonl", *records), tmp_path / "answers.jsonl"
    words = ["eval", str(tmp_path / "run"), "--tasks", file, "--samples", "2", "--answers", str(answers)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    why = "the first: ValueError: the problem's 'target' is None"
    assert f"p: 3 of 6 answers could not be scored, {why}" in result.stderr
    said = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [len(line["why"]) for line in said] == [3, 3]


LOSES = """
import os
if os.path.exists(LOST): raise RuntimeError("its server is lost")
def verify(answer, problem):
    open(LOST, "w").close()
    os._exit(3)
"""


def test_a_verifier_that_is_lost_while_it_scores_ends_an_evaluation_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it ends a run of `dryvine rl`."""
    run_of(small(), tmp_path / "run")
    (tmp_path / "losing.py").write_text(f"LOST = {str(tmp_path / 'lost')!r}{LOSES}")
    monkeypatch.setitem(names.VERIFIERS, "length", "losing")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "def f", "verifier": "length", "max_tokens": 3})
    monkeypatch.setattr(sys, "argv", ["dryvine", "eval", str(tmp_path / "run"), "--tasks", file, "--samples", "4"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "dryvine: verifier length: its server is lost\n" in capsys.readouterr().err


def test_all_checkpoints_of_a_run_are_kept_as_rows_and_drawn(tmp_path: Path) -> None:
    for step in (0, 3):
        run_of(small(), tmp_path / f"run{step}")
    checkpoints = tmp_path / "run0" / "checkpoints"
    (tmp_path / "run3" / "checkpoints" / "step-00000000").rename(checkpoints / "step-00000003")
    file = jsonl(tmp_path / "texts.jsonl", {"text": TEXTS[0]})
    code, said = invoke("eval", str(tmp_path / "run0"), "--all", "--tasks", file)
    assert code == 0
    assert "run0@0" in said
    assert "run0@3" in said
    kept = [json.loads(line) for line in (tmp_path / "run0" / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept] == [0, 3]
    assert (tmp_path / "run0" / "eval.png").stat().st_size > 1000


def test_what_a_killed_evaluation_left_half_written_harms_no_later_one(tmp_path: Path) -> None:
    run_of(small(), tmp_path / "run")
    file = jsonl(tmp_path / "texts.jsonl", {"text": TEXTS[0]})
    for torn in (tmp_path / "run" / "eval.jsonl", tmp_path / "said.jsonl"):
        torn.write_text('{"task": "texts.js')
    for _ in range(2):
        assert invoke("eval", str(tmp_path / "run"), "--tasks", file, "--answers", str(tmp_path / "said.jsonl"))[0] == 0
    for whole in (tmp_path / "run" / "eval.jsonl", tmp_path / "said.jsonl"):
        kept = [json.loads(line) for line in whole.read_text().splitlines()]
        assert [row["task"] for row in kept] == ["texts"] * 2


@pytest.mark.parametrize("option", ["--answers", "--out"])
def test_files_that_cannot_be_written_are_said_before_a_model_is_opened(option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    file = jsonl(tmp_path / "texts.jsonl", {"text": TEXTS[0]})
    with pytest.raises(CannotWrite, match="file/in: Not a directory; fix that"):
        invoke("eval", str(tmp_path / "no-model"), "--tasks", file, option, str(tmp_path / "file" / "in"))


def test_an_export_has_the_figures_of_its_run_and_nothing_is_written_into_it(tmp_path: Path) -> None:
    run = run_of(small(), tmp_path / "run")
    export_hf(run, tmp_path / "out", Encoding("fp32"), tokenizer_of(run), quiet, 1 << 30)
    before = sorted((tmp_path / "out").iterdir())
    file = jsonl(tmp_path / "texts.jsonl", {"text": TEXTS[0]})
    each = [rows_of(str(tmp_path / name), "--tasks", file)[0]["figures"] for name in ("run", "out")]
    assert each[0] == each[1]
    assert sorted((tmp_path / "out").iterdir()) == before


def test_an_answer_that_cannot_be_given_counts_as_wrong_and_is_told(tmp_path: Path) -> None:
    run_of(small(), tmp_path / "run")
    file = jsonl(tmp_path / "m.jsonl", {"prompt": "x " * 99, "answer": "y"})
    code, said = invoke("eval", str(tmp_path / "run"), "--tasks", file, "--answers", str(tmp_path / "a.jsonl"))
    assert code == 1
    assert "exact_match" in said
    assert "64 positions" in json.loads((tmp_path / "a.jsonl").read_text())["failed"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "x.jsonl:1: no JSON"),
        ("[1]", "x.jsonl:1: no JSON object"),
        ('{"a": 1}', "x.jsonl:1: none of the fields"),
        ('{"text": ""}', "x.jsonl:1: text is ''"),
        ('{"prompt": "a", "choices": ["b"], "answer": 1}', "x.jsonl:1: answer is 1"),
        ('{"prompt": "a", "choices": [], "answer": 0}', "x.jsonl:1: choices is"),
        ('{"prompt": "a", "verifier": "maths"}', "x.jsonl:1: no verifier 'maths'"),
        ('{"prompt": [{"role": "user"}], "answer": "b"}', "x.jsonl:1: prompt is neither"),
        ('{"prompt": "a", "answer": "b", "max_tokens": 0}', "x.jsonl:1: max_tokens is 0"),
        ('{"text": "a"}\n{"prompt": "a", "answer": "b"}', "x.jsonl:2: has 'answer'"),
        ("", "x.jsonl: has no lines"),
    ],
)
def test_a_line_that_is_no_task_is_named_before_a_model_is_opened(tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(ValueError, match=why.replace("[", r"\[")):
        invoke("eval", "no-model", "--tasks", str(tmp_path / "x.jsonl"))


def test_a_prompt_that_is_too_long_for_its_choices_is_named(tmp_path: Path) -> None:
    run_of(small(), tmp_path / "run")
    file = jsonl(tmp_path / "x.jsonl", {"prompt": "x " * 99, "choices": ["a", "b"], "answer": 0})
    with pytest.raises(ValueError, match=r"x.jsonl:1: \d+ tokens, and 64 are read at once"):
        invoke("eval", str(tmp_path / "run"), "--tasks", file)


TASK = """task: animals
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: %s
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
%s
"""
CHOICE = 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]'
MATCH = "metric_list: [{metric: exact_match}]\ngeneration_kwargs: {until: ['!'], max_gen_toks: 5}"


@pytest.mark.long
@pytest.mark.parametrize(("kind", "more", "ours"), [("multiple_choice", CHOICE, "mc"), ("generate_until", MATCH, "m")])
def test_the_harness_measures_what_our_own_tasks_do(tmp_path: Path, kind: str, more: str, ours: str) -> None:
    run_of(small(), tmp_path / "run")
    words = (str(tmp_path / "run"), "x", "--max-tokens", "5", "--temperature", "0")
    text = invoke("generate", *words)[1].removeprefix("x").removesuffix("\n")
    fields = {"choices": [" a", " bb", " return"]} if ours == "mc" else {"until": "!", "max_tokens": 5}
    answers = [0, 1, 2, 1] if ours == "mc" else [text, "never", text, text]
    lines = [{"prompt": "x", "answer": answer, **fields} for answer in answers]
    file = jsonl(tmp_path / "lines.jsonl", *lines)
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "animals.yaml").write_text(TASK % (file, kind, more))
    command = [sys.executable, "-m", "dryvine.launch.cli", "eval", str(tmp_path / "run"), "--json", "--tasks", file]
    harness = ["--harness", "animals", "--harness-tasks", str(tmp_path / "yaml")]
    done = subprocess.run([*command, *harness], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    mine, theirs = (json.loads(line)["figures"] for line in done.stdout.splitlines() if line.startswith("{"))
    names = ("accuracy", "acc") if ours == "mc" else ("exact_match", "exact_match")
    assert 0 < mine[names[0]]["value"] == theirs[names[1]]["value"] < 1
