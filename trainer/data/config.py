"""What a run reads: `DataConfig`, the `[data]` table of a config file.

It imports neither torch nor numpy, so a config can be checked on a login node. Everything that decides which tokens a
run sees is here or in the dataset's `dataset.json`; the order in which it sees them follows from the run's seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, model_validator

STDLIB = "stdlib"


class DataError(ValueError):
    """Data that cannot be used: the message says in one line what, where, and the fix."""


class BlendEntry(BaseModel, frozen=True, extra="forbid"):
    """A `[[data.blend]]`: a source, and how much of it.

    `weight` is its share of every stretch of the run, and it is read again when it ends. `tokens` and `epochs` say how
    much of it there is in the whole blend, and the run may not be longer than that.
    """

    source: str = Field(description="as data.source")
    weight: float | None = Field(default=None, gt=0, description="relative to the other entries' weights")
    tokens: int | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0, description="how often its training split is read")
    name: str | None = Field(default=None, description="in metrics: val_loss.NAME; by default the folder's name")

    @property
    def label(self) -> str:
        return self.name or Path(self.source).name

    @model_validator(mode="after")
    def _one_amount(self) -> BlendEntry:
        if sum(amount is not None for amount in (self.weight, self.tokens, self.epochs)) != 1:
            raise ValueError(f"{self.source}: give one of weight, tokens and epochs")
        return self


class DataConfig(BaseModel, frozen=True, extra="forbid"):
    """`vocab_size` is the width of the model's embedding and head, and may be larger than the dataset's vocabulary.

    `fim_rate` and `dir` apply to the embedded corpus only, `validation_fraction` to it and to Megatron's files; a
    folder made by `dryvine data build` has its own.
    """

    source: str = Field(
        default=STDLIB, description='"stdlib", a folder made by `dryvine data build`, or a Megatron prefix'
    )
    blend: tuple[BlendEntry, ...] = Field(default=(), description="several sources, in place of `source`")
    mask: Literal["none", "document"] = Field(
        default="none", description='"document": attention and targets stay inside documents, positions restart in each'
    )
    seq_len: int = Field(gt=0, description="tokens of one sequence, without the extra ones that are only predicted")
    vocab_size: int = Field(default=4096, ge=260, le=2**31, description="256 bytes, 4 special tokens, and merges")
    dir: Path = Field(default=Path("data/stdlib"), description="where datasets of the embedded corpus are kept")
    validation_fraction: float = Field(default=0.05, gt=0, le=0.5, description="of files, by a hash of their path")
    fim_rate: float = Field(default=0.0, ge=0, le=1, description="of documents put prefix-suffix-middle; V3: 0.1")

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source that the run reads."""
        return tuple(entry.source for entry in self.blend) or (self.source,)

    @model_validator(mode="after")
    def _blend_adds_up(self) -> DataConfig:
        if len({entry.weight is None for entry in self.blend}) > 1:
            raise ValueError("blend: weight beside tokens or epochs; give every source a weight, or none of them")
        labels = [entry.label for entry in self.blend]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"blend: two sources are called {twice}; give one of them another `name`")
        return self
