"""The parameters of a build: `BuildSpec` says how, `BuildJob` from which files and into which folder."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, Field, field_serializer

from dryvine.trainer.data import tokenizer
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import FORMAT
from dryvine.trainer.data.inputs import Input, printable
from dryvine.trainer.data.readers.fields import Fields, condition
from dryvine.trainer.data.readers.table import kind_of
from dryvine.trainer.data.sampling import uniform
from dryvine.trainer.data.stream import StreamPosition

OnProgress = Callable[[str, int, int], None]  # name of the pass, input bytes done, input bytes in all


def no_progress(stage: str, done: int, total: int) -> None:
    """An OnProgress that shows nothing."""


class BuildSpec(BaseModel, frozen=True, extra="forbid"):
    """How text becomes a dataset. Together with the names and sizes of the inputs, it decides every byte of it."""

    vocab_size: int | None = Field(default=None, ge=260)  # None: that of `tokenizer`
    tokenizer: Path | None = None  # a tokenizer.json; None: learn one
    field: str = "text"
    where: tuple[str, ...] = ()  # conditions that a record must meet, see `readers.fields`
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    fim_rate: float = Field(default=0.0, ge=0, le=1)
    shard_tokens: int = Field(default=2**26, gt=0)  # a kill loses at most one shard's work, about a minute
    sample_bytes: int = Field(default=2**28, gt=0)  # of text to learn the vocabulary from

    @field_serializer("tokenizer", when_used="json-unless-none")
    def _tokenizer_name(self, path: Path) -> str:
        return printable(str(path))

    @property
    def fields(self) -> Fields:
        """Raises DataError for a condition that cannot be read."""
        return Fields(self.field, tuple(condition(each) for each in self.where))

    def described(self) -> dict[str, str | int | float | None]:
        """The spec as in dataset.json and in the fingerprint; conditions only if there are any."""
        values = self.model_dump(mode="json", exclude={"where"})
        return values | ({"where": " and ".join(self.where)} if self.where else {})

    def holds_out(self, key: bytes) -> bool:
        """Whether the document with this key is in the validation split."""
        return uniform("split", key) < self.validation_fraction

    def check(self, inputs: Sequence[Input]) -> None:
        """Raise DataError, before anything is written, if the conditions do not fit the inputs, or the given tokenizer
        the rest."""
        text = next((file.name for file in inputs if kind_of(file.path).is_document), None)
        if self.fields.where and text:
            raise DataError(f"--where: {printable(text)} is text without fields; build it by itself, and blend the two")
        if not self.tokenizer:
            return
        given = tokenizer.load(self.tokenizer)
        if self.vocab_size not in (None, given.size):
            raise DataError(f"--vocab-size {self.vocab_size}: {self.tokenizer} has {given.size} ids; leave one out")
        if self.fim_rate and not given.fim:
            raise DataError(f"--fim-rate: {self.tokenizer} lacks {' '.join(tokenizer.FIM)}; add them, or leave it out")


def fingerprint(inputs: Sequence[Input], spec: BuildSpec) -> str:
    """16 hex digits, equal for equal data on any machine, wherever the files and the tokenizer lie."""
    given = hashlib.sha256(spec.tokenizer.read_bytes()).hexdigest() if spec.tokenizer else None
    settings = {name: value for name, value in spec.described().items() if name != "tokenizer"}
    described = [FORMAT, settings, given, [(file.name, file.size) for file in inputs]]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class BuildJob:
    """One build: from which files, how, into which folder, and the callback for progress."""

    inputs: Sequence[Input]
    spec: BuildSpec
    folder: Path
    on_progress: OnProgress = no_progress
    processes: int = 1  # that tokenize; they change no byte

    @cached_property
    def _starts(self) -> list[int]:
        """Bytes before each input, then the bytes of all."""
        return [0, *itertools.accumulate(file.size for file in self.inputs)]

    def report(self, stage: str, position: StreamPosition) -> None:
        self.on_progress(stage, self._starts[position.file] + position.byte, self._starts[-1])
