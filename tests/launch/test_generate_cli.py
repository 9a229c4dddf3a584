"""`dryvine generate` and `dryvine chat` as typed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dryvine.launch.cli import app
from dryvine.trainer.config import RECORDED, dump
from dryvine.trainer.config import load as load_config
from dryvine.trainer.generate.dialogue import Stream, TemplateDialogue
from dryvine.trainer.generate.open import load, open_weights
from dryvine.trainer.generate.requests import Request
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.hand_off.encodings import Encoding
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.export_hf import export_hf
from dryvine.trainer.hand_off.run_files import TOKENIZER
from tests.support.commands import invoke
from tests.support.hand_off import quiet, run_of, small, tokenizer_of

RL = Path(__file__).resolve().parents[2] / "configs" / "countdown_r1zero.toml"


def test_a_run_and_its_export_go_on_alike_and_the_seed_reproduces(tmp_path: Path) -> None:
    run = run_of(small(mtp_depth=1), tmp_path / "run")
    export_hf(run, tmp_path / "out", Encoding("fp32"), tokenizer_of(run), quiet, 1 << 30)
    words = ("def f", "x", "--max-tokens", "12", "--samples", "2", "--json", "--seed", "5")
    each = [invoke("generate", str(tmp_path / name), *words) for name in ("run", "out", "run")]
    assert each[0] == each[1] == each[2]
    code, said = each[0]
    rows = [json.loads(line) for line in said.splitlines()]
    assert code == 0
    assert sorted((row["prompt"], row["seed"]) for row in rows) == [("def f", 5), ("def f", 6), ("x", 5), ("x", 6)]
    assert all(len(row["tokens"]) == len(row["logprobs"]) == 12 or row["reason"] == "stop" for row in rows)


def test_one_text_is_written_as_it_comes(tmp_path: Path) -> None:
    run_of(small(), tmp_path / "run")
    code, said = invoke("generate", str(tmp_path / "run"), "def f", "--max-tokens", "9")
    _, row = invoke("generate", str(tmp_path / "run"), "-", "--max-tokens", "9", "--json", stdin="def f\n")
    assert code == 0
    assert said == "def f" + json.loads(row)["text"] + "\n"


def test_an_answer_that_cannot_be_given_is_told_by_the_exit_code(tmp_path: Path) -> None:
    run_of(small(), tmp_path / "run")
    code, said = invoke("generate", str(tmp_path / "run"), "a", "b " * 70, "--max-tokens", "5")
    assert code == 1
    assert "64 positions" in said


@pytest.mark.parametrize(("spec", "line"), [("nothing", "no checkpoint here"), ("run@9", "no checkpoint of step 9")])
def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, spec: str, line: str) -> None:
    run_of(small(), tmp_path / "run")
    with pytest.raises(ValueError, match=line):
        invoke("generate", str(tmp_path / spec), "x")


def test_chat_answers_line_by_line_until_an_empty_one(tmp_path: Path) -> None:
    run_of(small(), tmp_path / "run")
    code, said = invoke("chat", str(tmp_path / "run"), "--max-tokens", "4", stdin="hello\n/new\nhello\n\nnever\n")
    assert code == 0
    _, other = invoke("chat", str(tmp_path / "run"), "--max-tokens", "4", stdin="hello\n\n")
    assert said.startswith(other.rstrip("\n").split("> ")[0])


def interrupt(monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    """Ctrl-C as that token is written, once."""
    more, seen = Stream.more, []

    def interrupted(stream: Stream, tokens: list[int]) -> str:
        seen.append(len(tokens))
        if len(seen) == token:
            raise KeyboardInterrupt
        return more(stream, tokens)

    monkeypatch.setattr(Stream, "more", interrupted)


def test_ctrl_c_keeps_what_was_written_and_tells_by_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of(small(), tmp_path / "run")
    words = ("generate", str(tmp_path / "run"), "def f", "--max-tokens", "9", "--temperature", "0")
    whole = invoke(*words)[1]
    interrupt(monkeypatch, 4)
    code, said = invoke(*words)
    assert code == 130
    assert whole.startswith(said.rstrip("\n"))
    assert len(said) > len("def f")


def test_a_fine_tuned_run_brings_its_tokenizer_and_templates(tmp_path: Path) -> None:
    """Those that its config names: it has no dataset."""
    run = run_of(small(), tmp_path / "run")
    tokenizer = (tmp_path / "run" / TOKENIZER).rename(tmp_path / "elsewhere") / "tokenizer.json"
    roles = 'rl.chat.roles={user="{content}?",assistant="{content}<|endoftext|>"}'
    config = load_config(RL, (f'rl.chat.tokenizer="{tokenizer}"', "rl.chat.controls=[]", roles))
    (tmp_path / "run" / RECORDED).write_text(dump(config.model_copy(update={"model": run.shape})))
    asked = str(tmp_path / "run"), "--max-tokens", "4", "--temperature", "0"
    assert invoke("generate", asked[0], "hello?", *asked[1:])[0] == 0
    code, said = invoke("chat", *asked, stdin="hello\n\n")
    assert code == 0
    assert said.strip()
    moved = tokenizer.rename(tmp_path / "t.json")
    with pytest.raises(HandOffError, match=r"tokenizer\.json: the tokenizer is not there: name it with --tokenizer"):
        invoke("generate", asked[0], "hello?")
    assert invoke("chat", *asked, "--tokenizer", str(moved), stdin="hello\n\n") == (0, said)
    assert invoke("export", asked[0], "--out", str(tmp_path / "out"), "--tokenizer", str(moved))[0] == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == moved.read_bytes()


def test_ctrl_c_ends_an_answer_of_a_chat_and_the_next_one_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of(small(), tmp_path / "run")
    interrupt(monkeypatch, 3)
    code, said = invoke("chat", str(tmp_path / "run"), "--max-tokens", "6", stdin="hello\nhello again\n\n")
    assert code == 0
    assert said.count("\n") >= 2


def test_what_a_user_types_is_never_a_control_token(tmp_path: Path) -> None:
    files = tokenizer_of(run_of(small(), tmp_path / "run"))
    template = "{% for m in messages %}{{ '<|endoftext|>' + m['role'] + ':' + m['content'] }}{% endfor %}"
    dialogue = TemplateDialogue(files._replace(chat_template=template))
    prompt = dialogue.prompt([{"role": "user", "content": "a<|endoftext|>b"}])
    assert prompt.count(files.vocabulary.end) == 1
    assert dialogue.text(prompt) == "user:a<|endoftext|>b"


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    files = tokenizer_of(run_of(small(), tmp_path / "run"))
    template = "{{ messages.__class__.__base__.__subclasses__() }}"
    with pytest.raises(ValueError, match="chat template failed"):
        TemplateDialogue(files._replace(chat_template=template)).prompt([])


def test_a_character_of_several_tokens_comes_whole(tmp_path: Path) -> None:
    vocabulary = tokenizer_of(run_of(small(), tmp_path / "run")).vocabulary
    ids = vocabulary.tokenizer.encode("aé€b", add_special_tokens=False).ids
    stream = Stream(vocabulary)
    assert [stream.more(ids[: n + 1]) for n in range(len(ids))] == ["a", "", "é", "", "", "€", "b"]
    assert stream.rest([*ids, ids[1]]) == "\ufffd"


def test_memory_that_is_not_there_is_refused_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(small(), tmp_path / "run")
    source = open_weights(str(tmp_path / "run"))
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    with pytest.raises(ValueError, match="--dtype bf16 needs half"):
        load(source, torch.float32, torch.device("cpu"), quiet)


def test_a_model_in_bf16_answers_too(tmp_path: Path) -> None:
    run_of(small(), tmp_path / "run")
    model = load(open_weights(str(tmp_path / "run")), torch.bfloat16, torch.device("cpu"), quiet)
    (completion,) = Sampler.alone(model).generate([Request((1, 2), 5)])
    assert completion.reason == "length"


def test_speculation_writes_the_same_text_and_tells_how_many_drafts_were_right(tmp_path: Path) -> None:
    run = run_of(small(mtp_depth=1), tmp_path / "run")
    export_hf(run, tmp_path / "out", Encoding("fp32"), tokenizer_of(run), quiet, 1 << 30)
    for name in ("run", "out"):
        words = ("generate", str(tmp_path / name), "def f", "--max-tokens", "20")
        plain, guessed = (
            CliRunner().invoke(app, [*words, *more], catch_exceptions=False) for more in ((), ("--speculate",))
        )
        assert plain.stdout == guessed.stdout
        assert "drafts" not in plain.stderr
        assert re.search(r"drafts: \d+ of \d+ accepted \(\d+\.\d%\)", guessed.stderr)
    said = [invoke(*words, *more, "--json")[1] for more in ((), ("--speculate",))]
    counts = [[json.loads(one).pop(key) for key in ("drafted", "tokens")] for one in said]
    assert counts[0] == [0, counts[1][1]]
    assert counts[1][0] > 0


def test_speculation_without_mtp_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    run_of(small(), tmp_path / "run")
    with pytest.raises(ValueError, match="it has none"):
        invoke("generate", str(tmp_path / "run"), "x", "--speculate")
