"""The tasks: every demonstration of countdown is what it claims, nothing held out is trained on, bad lines named."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dryvine.launch.cli import app
from dryvine.trainer.data.tokenizer import load
from dryvine.trainer.rl.tasks.countdown import every_solution, puzzles
from dryvine.trainer.rl.tasks.countdown_demos import CONTROLS, tokenizer, worked, write
from dryvine.trainer.rl.tasks.names import questions
from dryvine.trainer.rl.tasks.question import TaskError
from dryvine.trainer.rl.verifiers.arithmetic import evaluate
from dryvine.trainer.rl.verifiers.countdown import verify
from dryvine.trainer.rl.verifiers.format import verify as verify_format


def test_every_solution_is_one_by_the_verifier() -> None:
    known = [(n, t, e) for n, solutions in every_solution().items() for t, es in solutions.items() for e in es]
    assert len(known) > 20_000
    for numbers, target, expression in known[::7]:
        problem = {"numbers": list(numbers), "target": target, "left_to_right": True}
        assert verify(worked(expression), problem).score == 1.0
        assert verify(worked(expression), {**problem, "target": target + 1}).score == 0.0


def test_thoughts_are_the_aim_and_two_steps() -> None:
    assert worked("7*5-9") == "<think>26,7*5=35,35-9=26</think><answer>7*5-9</answer>"
    assert worked("1-15*2") == "<think>-28,1-15=-14,-14*2=-28</think><answer>1-15*2</answer>"
    assert evaluate("1-15*2", left_to_right=True)[0] == -28


def test_a_tenth_is_held_out_whatever_the_order() -> None:
    train, held = set(puzzles("train")), set(puzzles("validation"))
    assert not train & held
    assert 0.08 < len(held) / len(train | held) < 0.12
    texts = [question.messages[0]["content"] for question in questions({"name": "countdown"}, "validation")]
    assert {(tuple(sorted(numbers)), target) for *numbers, target in (map(int, text.split()) for text in texts)} == held
    first = questions({"name": "countdown"}, "train")[:64]
    assert len({q.record["target"] for q in first}) > 20, "the first ones are no sample"


def test_demonstrations_are_as_wrong_as_asked(tmp_path: Path) -> None:
    write(tmp_path, 2000, 0.6, seed=1)
    held, right = set(puzzles("validation")), Counter[bool]()
    for line in (tmp_path / "train.jsonl").read_text().splitlines():
        asked, answer = (message["content"] for message in json.loads(line)["messages"])
        *numbers, target = map(int, asked.split())
        assert (tuple(sorted(numbers)), target) not in held
        assert verify_format(answer, {}).score == 1.0
        aim, *steps = answer.removeprefix("<think>").partition("</think>")[0].split(",")
        assert all(evaluate(left)[0] == int(value) for left, value in (step.split("=") for step in steps))
        assert steps[-1].endswith(f"={aim}")
        right[verify(answer, {"numbers": numbers, "target": target, "left_to_right": True}).score == 1.0] += 1
    assert 0.37 < right[True] / 2000 < 0.44  # few puzzles have no other target
    again = tmp_path / "again"
    write(again, 2000, 0.6, seed=1)
    assert (again / "train.jsonl").read_bytes() == (tmp_path / "train.jsonl").read_bytes()
    assert len((tmp_path / "validation.jsonl").read_text().splitlines()) == 100


def test_numbers_can_be_smaller(tmp_path: Path) -> None:
    write(tmp_path, 50, 0.0, seed=1, largest=6)
    asked = [json.loads(line)["messages"][0]["content"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert max(int(number) for text in asked for number in text.split()[:3]) == 6
    found = {question.messages[0]["content"] for question in questions({"name": "countdown", "largest": 6}, "train")}
    assert found >= set(asked)
    assert len(found) < len(questions({"name": "countdown"}, "train")) / 10


def test_the_tokenizer_has_25_tokens_and_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1, 0.0, seed=0)
    vocabulary = load(tmp_path / "tokenizer.json")
    assert vocabulary.size == 25
    text = "<|User|>7 5 9 26<|Assistant|><think>7*5=35,35-9=26</think><answer>7*5-9</answer><|endoftext|>"
    ids = tokenizer().encode(text).ids
    assert len(ids) == len("7 5 9 26" + "7*5=35,35-9=26" + "7*5-9") + 7
    assert tokenizer().decode(ids, skip_special_tokens=False) == text
    assert tokenizer().encode("é").ids == [CONTROLS.index("<unk>")]
    assert vocabulary.tokenizer.encode("<think>").ids == [CONTROLS.index("<unk>")] * 7, "text is no control token"


LINE = {"question": "2+3?", "answer": 5}


def of_lines(tmp_path: Path, *lines: str, **keys: object) -> dict[str, object]:
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(lines))
    table = {"name": "jsonl", "train": str(path), "validation": str(path), "prompt": "question"}
    return table | {"verifiers": {"integer": 1.0, "format": 0.1}} | keys


def test_a_file_of_questions(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        LINE | {"role": "user", "content": "2"},
    ]
    task = of_lines(tmp_path, json.dumps(LINE), "", json.dumps({"question": turns, "answer": 2}), system="Think.")
    first, second = questions(task, "train")
    assert first.messages == ({"role": "system", "content": "Think."}, {"role": "user", "content": "2+3?"})
    assert first.record == LINE
    assert first.weights == {"integer": 1.0, "format": 0.1}
    assert first.deciding == "integer"
    assert [message["role"] for message in second.messages] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("line", "keys", "complaint"),
    [
        ("{", {}, r"rl.task.train: .*q.jsonl: 1 bad line, .*: line 2: no JSON"),
        ("[1]", {}, r"line 2: no object with a field 'question'; set rl.task.prompt"),
        ('{"q": 1}', {}, r"line 2: no object with a field 'question'"),
        ('{"question": 1}', {}, r"line 2: the prompt is neither text nor a list of messages"),
        ('{"question": [{"role": "user"}]}', {}, r"line 2: the prompt is neither"),
        ('\n[2]\n"\\ud800\n' + "[" * 100_000, {}, r"3 bad lines, .*: line 3: no object.*; line 4: no .*; line 5: no "),
        ("", {"verifiers": {"maths": 1}}, r"rl.task.verifiers: no verifier 'maths'; there are code"),
        ("", {"verifiers": {}}, r"rl.task.verifiers: "),
        (
            "",
            {"file": "x"},
            r"rl.task.file: .*this table has train, validation, prompt, system, verifiers; rl.task.name is jsonl",
        ),
        ("", {"train": "none.jsonl"}, r"rl.task.train: none.jsonl: .*No such file"),
        ("", {"name": "count"}, r"rl.task.name = 'count': there are countdown, jsonl"),
    ],
)
def test_what_is_no_question_is_refused_with_its_place(
    tmp_path: Path, line: str, keys: dict[str, object], complaint: str
) -> None:
    with pytest.raises(TaskError, match=complaint):
        questions(of_lines(tmp_path, json.dumps(LINE), line, **keys), "train")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="has no questions"):
        questions(of_lines(tmp_path), "validation")


def test_the_command_writes_demonstrations(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demos", "--out", str(tmp_path / "new" / "folder"), "--count", "20"])
    assert result.exit_code == 0, result.output
    assert "20 demonstrations, 60% of another target" in result.output
    assert len((tmp_path / "new" / "folder" / "train.jsonl").read_text().splitlines()) == 20
