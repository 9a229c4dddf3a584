"""A run goes on with the tokens that it began with, wherever they lie, and with no others."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dryvine.trainer import journal
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.data.build import build
from dryvine.trainer.data.identity import DataIdentity, identify
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.spec import BuildSpec
from dryvine.trainer.data.splits import open_data
from tests.support.rig import train_on

Tiny = Callable[..., Config]
SMALL = ("model.layers=2", "batch.sequences=2", "run.steps=1", "model.vocab=400", "data.vocab_size=400")


def identity(config: Config) -> DataIdentity:
    return open_data(config).identity


@pytest.fixture
def trained(tiny: Tiny, corpus: Path, tmp_path: Path) -> Callable[..., Config]:
    """The config of a run that has saved, with its data copied to `data` under the test's folder."""
    shutil.copytree(corpus, tmp_path / "data")
    train_on(0, tiny(*SMALL, f'data.source="{tmp_path / "data"}"'))
    return lambda folder: tiny(*SMALL, f'data.source="{tmp_path / folder}"')


def test_the_same_bytes_at_another_path_are_accepted(trained: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "moved")
    journal.same_run(trained("moved"), identity(trained("moved")))


def test_data_made_anew_in_place_is_refused(trained: Callable[..., Config], tmp_path: Path) -> None:
    before = identity(trained("data"))
    shutil.rmtree(tmp_path / "data")
    pattern = str(Path(sysconfig.get_path("stdlib")) / "a*.py")
    build(match_files([pattern]), BuildSpec(vocab_size=360, validation_fraction=0.3), tmp_path / "data")
    after = identity(trained("data"))
    assert after.data != before.data
    assert after.tokenizer != before.tokenizer
    with pytest.raises(ConfigError, match=r"the data of this run is not what it was: .*data was made anew"):
        journal.same_run(trained("data"), after)
    with pytest.raises(ConfigError, match="the tokenizer of this run is not what it was"):
        journal.same_run(trained("data"), DataIdentity(before.data, after.tokenizer))


class Line:
    """Tokens as a line, in which no document ends."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.all = tokens

    def __len__(self) -> int:
        return len(self.all)

    def tokens(self, start: int, length: int) -> np.ndarray:
        return self.all[start : start + length]

    def ends_between(self, start: int, stop: int) -> np.ndarray:
        return np.empty(0, np.int64)


def test_the_place_where_the_splits_part_counts() -> None:
    line = np.arange(100)
    first, second = (identify((Line(line[:at]), Line(line[at:])), None) for at in (60, 70))
    assert first != second


def test_of_a_blend_the_validation_splits_count_too(tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "data")
    entries = f'[{{source="{corpus}", weight=1, name="a"}}, {{source="{tmp_path}/data", weight=1}}]'
    before = identity(tiny(f"data.blend={entries}"))
    (shard,) = (tmp_path / "data" / "val").glob("*.bin")
    shard.write_bytes(bytes(2) + shard.read_bytes()[2:])
    assert identity(tiny(f"data.blend={entries}")) != before


def test_one_block_of_tokens_tells_two_datasets_apart(trained: Callable[..., Config], tmp_path: Path) -> None:
    """Of the same sizes: other tokens in the middle of the only shard."""
    before = identity(trained("data"))
    (shard,) = (tmp_path / "data" / "train").glob("*.bin")
    content = bytearray(shard.read_bytes())
    middle = len(content) // 2 // 2048 * 2048
    content[middle : middle + 8] = bytes(8)
    shard.write_bytes(content)
    assert identity(trained("data")).data != before.data
    assert identity(trained("data")).tokenizer == before.tokenizer
