"""The order is a bijection in every epoch, for any number of windows, and reading by it gives the right tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import dtype_for
from dryvine.trainer.data.order import SequenceOrder
from dryvine.trainer.data.packed_tokens import PackedTokens
from dryvine.trainer.data.source import TokenSource
from tests.support.datasets import write_dataset


@settings(max_examples=60, deadline=None)
@given(windows=st.integers(1, 1500), seed=st.integers(0, 2**40), epoch=st.integers(0, 2**30))
def test_every_window_once_in_every_epoch(windows: int, seed: int, epoch: int) -> None:
    order = SequenceOrder(seed, windows)
    assert sorted(order.window(epoch * windows + i) for i in range(windows)) == list(range(windows))


@settings(max_examples=20, deadline=None)
@given(windows=st.integers(2**33, 2**62), seed=st.integers(0, 2**20), places=st.sets(st.integers(0, 2**33 - 1)))
def test_huge_epochs_need_no_table_and_do_not_collide(windows: int, seed: int, places: set[int]) -> None:
    order = SequenceOrder(seed, windows)
    seen = {order.window(place) for place in places}
    assert len(seen) == len(places)
    assert all(0 <= window < windows for window in seen)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first = [SequenceOrder(1, 500).window(i) for i in range(1000)]
    assert first == [SequenceOrder(1, 500).window(i) for i in range(1000)]
    assert first[:500] != first[500:]
    assert first != [SequenceOrder(2, 500).window(i) for i in range(1000)]


def test_the_order_never_changes() -> None:
    """A run that is resumed by a later version goes on with the sequences that it has not read."""
    assert [SequenceOrder(0, 1000).window(i) for i in (0, 1, 2, 999, 1000)] == [902, 105, 130, 823, 461]
    assert [SequenceOrder(7, 2**40 + 5).window(i) for i in (0, 1, 2**40, 2**41)] == [
        796573344326,
        134104890819,
        10577194274,
        763808889066,
    ]


def test_order_looks_shuffled() -> None:
    """Means of a random permutation within five sigma: where window 0 to n/2 falls, and steps between neighbours."""
    n, order = 4001, SequenceOrder(0, 4001)
    windows = np.array([order.window(i) for i in range(n)])
    assert abs(windows[: n // 2].mean() - n / 2) < 5 * n / (12 * n / 2) ** 0.5
    assert abs(np.abs(np.diff(windows)).mean() - n / 3) < 5 * n / (18 * n) ** 0.5
    assert (np.diff(windows) == 1).sum() < 10


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_reads_across_shard_edges(tmp_path: Path, vocab_size: int) -> None:
    line = write_dataset(tmp_path, [7, 1, 12, 300], vocab_size)
    packed = PackedTokens(tmp_path, "train")
    assert len(packed) == 320
    for start in range(25):
        for length in (0, 1, 5, 13, 320 - start):
            np.testing.assert_array_equal(packed.tokens(start, length), line[start : start + length])
    assert packed.tokens(0, 3).dtype == np.dtype(dtype_for(vocab_size))
    assert packed.tokens(320, 0).size == 0
    np.testing.assert_array_equal(packed.document_ends(), [7, 8, 20, 320])
    for start, length in ((-1, 2), (319, 2), (321, 0)):
        with pytest.raises(IndexError):
            packed.tokens(start, length)


@pytest.mark.parametrize("size", [0, 13, 15, 16])
def test_a_shard_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    """Cut off, or from another build: its tokens would not be those that the ends count."""
    write_dataset(tmp_path, [7, 12])
    shard = tmp_path / "train" / "00000.bin"
    shard.write_bytes(bytes(size))
    said = rf"00000\.bin: {size} bytes where dataset\.json says 14; copy or build it again"
    with pytest.raises(DataError, match=said):
        PackedTokens(tmp_path, "train")
    shard.unlink()
    with pytest.raises(DataError, match=r"00000\.bin: 0 bytes"):
        PackedTokens(tmp_path, "train")


def test_the_narrowest_type_that_holds_every_id() -> None:
    assert dtype_for(65536) == "<u2"
    assert dtype_for(65537) == "<u4"


def test_wide_tokens_survive(tmp_path: Path) -> None:
    line = write_dataset(tmp_path, [40_000, 39_000], 78_000)
    np.testing.assert_array_equal(PackedTokens(tmp_path, "train").tokens(65_000, 9_000), line[65_000:74_000])


def test_sequences_are_windows_by_number(tmp_path: Path) -> None:
    line = write_dataset(tmp_path, [33, 40, 51])
    source = TokenSource(tmp_path, "train", seq_len=10, extra=2, seed=5)
    assert source.windows == 12  # the last window ends at 122 of 124
    rows = source.sequences(3, 4, stride=5)
    assert rows.dtype == np.int64
    for row, number in zip(rows, (3, 8, 13, 18), strict=True):
        start = source.order.window(number) * 10
        np.testing.assert_array_equal(row, line[start : start + 12])
    inputs = source.sequences(0, 12)[:, :10]
    np.testing.assert_array_equal(np.sort(inputs.ravel()), np.arange(120))


@pytest.mark.parametrize(("tokens", "windows"), [(21, 1), (22, 2), (31, 2), (32, 3)])
def test_last_window_has_its_targets(tmp_path: Path, tokens: int, windows: int) -> None:
    write_dataset(tmp_path, [tokens])
    source = TokenSource(tmp_path, "train", seq_len=10, extra=2, seed=0)
    assert source.windows == windows
    assert source.sequences(0, 50).shape == (50, 12)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, [11])
    with pytest.raises(DataError, match="train has 11 tokens and one sequence needs 12"):
        TokenSource(tmp_path, "train", seq_len=10, extra=2, seed=0)
    with pytest.raises(DataError, match="val has 0 tokens"):
        TokenSource(tmp_path, "val", seq_len=10, extra=2, seed=0)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished dataset"):
        PackedTokens(tmp_path, "train")
    write_dataset(tmp_path, [11])
    (tmp_path / "train" / "00000.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"00000\.bin: 4 bytes where dataset\.json says 22"):
        PackedTokens(tmp_path, "train")
    (tmp_path / "dataset.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="not of format 1"):
        PackedTokens(tmp_path, "train")
