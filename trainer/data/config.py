"""What a run reads: `DataConfig`, the `[data]` table of a config file.

It imports neither torch nor numpy, so a config can be checked on a login node. Everything that decides which tokens a
run sees is here or in the dataset's `dataset.json`; the order in which it sees them follows from the run's seed.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field

STDLIB = "stdlib"


class DataError(ValueError):
    """Data that cannot be used: the message says in one line what, where, and the fix."""


class DataConfig(BaseModel, frozen=True, extra="forbid"):
    """`vocab_size` is the width of the model's embedding and head; it may be larger than the dataset's vocabulary.

    `validation_fraction`, `fim_rate` and `dir` apply to the embedded corpus only; a folder made by `dryvine data build`
    has its own.
    """

    source: str = Field(default=STDLIB, description='"stdlib", or a folder made by `dryvine data build`')
    seq_len: int = Field(gt=0, description="tokens of one sequence, without the extra ones that are only predicted")
    vocab_size: int = Field(default=4096, ge=260, le=2**31, description="256 bytes, 4 special tokens, and merges")
    dir: Path = Field(default=Path("data/stdlib"), description="where datasets of the embedded corpus are kept")
    validation_fraction: float = Field(default=0.05, gt=0, le=0.5, description="of files, by a hash of their path")
    fim_rate: float = Field(default=0.0, ge=0, le=1, description="of documents put prefix-suffix-middle; V3: 0.1")
