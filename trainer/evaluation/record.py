"""The lines of a task's file, and the fields that all kinds of tasks read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Prompt = str | tuple[Mapping[str, str], ...]  # text to go on from, or messages


class EvalError(ValueError):
    """An evaluation that cannot run: what, where, and the fix, in one line."""


@dataclass(frozen=True)
class TaskLine:
    """A line's JSON object, and `FILE:LINE`."""

    where: str
    fields: Mapping[str, object]

    def text(self, name: str) -> str:
        """A field that is non-empty text. Raises EvalError."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value:
            raise EvalError(f"{self.where}: {name} is {value!r}: text is needed")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that is text or a list of texts. Raises EvalError."""
        value = self.fields.get(name)
        several = [value] if isinstance(value, str) else value
        if not isinstance(several, list) or not several or not all(isinstance(one, str) and one for one in several):
            raise EvalError(f"{self.where}: {name} is {value!r}: text or a list of texts is needed")
        return tuple(several)

    def count(self, name: str) -> int | None:
        """A field that is a positive integer; None if it is missing. Raises EvalError."""
        value = self.fields.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise EvalError(f"{self.where}: {name} is {value!r}: an integer of 1 at least is needed")
        return value

    def prompt(self) -> Prompt:
        """`prompt`: text, or messages with role and content. Raises EvalError."""
        value = self.fields.get("prompt")
        if not isinstance(value, list):
            return self.text("prompt")
        if not value or any(not isinstance(turn, dict) or {"role", "content"} - turn.keys() for turn in value):
            raise EvalError(f"{self.where}: prompt is neither text nor a list of messages with role and content")
        return tuple({"role": str(turn["role"]), "content": str(turn["content"])} for turn in value)


@dataclass(frozen=True)
class TaskFile:
    """The records of a file, and the hash of the lines they come from."""

    name: str  # the file's, without .jsonl
    path: Path
    sha256: str
    records: list[TaskLine]


def read_tasks(path: Path, limit: int | None) -> TaskFile:
    """The first `limit` lines of a .jsonl file. Raises EvalError naming the line."""
    try:
        data = path.read_bytes()
        lines = data.decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{path}: {error}; a task is a JSON object on each line of a file") from None
    records = [_record(f"{path}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()][:limit]
    if not records:
        raise EvalError(f"{path}: has no lines; a task is a JSON object on each line of a file")
    return TaskFile(path.name.removesuffix(".jsonl"), path, hashlib.sha256(data).hexdigest(), records)


def _record(where: str, line: str) -> TaskLine:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise EvalError(f"{where}: no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise EvalError(f"{where}: no JSON object")
    return TaskLine(where, fields)
