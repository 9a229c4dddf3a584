"""Questions from a file of your own: a JSON object a line, scored by the verifiers that the table names.

    [rl.task]
    name = "jsonl"
    train = "gsm8k/train.jsonl"
    validation = "gsm8k/test.jsonl"
    prompt = "question"            # the field that is the user's turn; or a field that holds a list of messages
    system = "Think between <think> and </think>, then answer between <answer> and </answer>."
    verifiers = { math = 1.0, format = 0.1 }

The whole object is the record that verifiers read, so their fields stand beside the prompt: `answer` for math.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, Field

from dryvine.trainer.data.config import DataError
from dryvine.trainer.rl.lines import BadLine, read_lines
from dryvine.trainer.rl.tasks.question import Question, SplitOfTask, TaskError, user
from dryvine.trainer.rl.verifiers.names import VERIFIERS


class JsonlOptions(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The keys of `[rl.task]` beside `name`."""

    train: str = Field(description="a .jsonl file")
    validation: str = Field(description="a .jsonl file of other questions")
    prompt: str = Field(default="prompt", description="field with the question, or with messages")
    system: str = Field(default="", description="a first message of the role system")
    verifiers: dict[str, float] = Field(min_length=1, description="weights in the reward; the first decides pass@k")


OPTIONS = JsonlOptions


def questions(options: JsonlOptions, split: SplitOfTask) -> Sequence[Question]:
    """In the file's order. Raises TaskError, which names every bad line."""
    if unknown := sorted(options.verifiers.keys() - VERIFIERS.keys()):
        raise TaskError(f"rl.task.verifiers: no verifier {unknown[0]!r}; there are {', '.join(sorted(VERIFIERS))}")
    if not any(options.verifiers.values()):
        raise TaskError("rl.task.verifiers: all weights are 0, so all rewards would be; give one of them another")
    path = Path(options.train if split == "train" else options.validation)
    try:
        return read_lines(path, lambda record: _question(options, record), "questions")
    except DataError as error:
        raise TaskError(f"rl.task.{split}: {error}") from None


def _question(options: JsonlOptions, record: object) -> Question:
    if not isinstance(record, dict) or options.prompt not in record:
        raise BadLine(f"no object with a field {options.prompt!r}; set rl.task.prompt to the one that has it")
    system = ({"role": "system", "content": options.system},) if options.system else ()
    return Question((*system, *_messages(record[options.prompt])), record, options.verifiers)


def _messages(prompt: object) -> tuple[Mapping[str, str], ...]:
    if isinstance(prompt, str) and prompt:
        return user(prompt)
    turns = prompt if isinstance(prompt, list) else []
    if not turns or any(not isinstance(turn, dict) or {"role", "content"} - turn.keys() for turn in turns):
        raise BadLine("the prompt is neither text nor a list of messages with role and content")
    return tuple({"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns)
