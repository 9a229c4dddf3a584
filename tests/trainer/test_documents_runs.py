"""Runs over packed documents: where documents are in a dataset, layouts, and the mean that a step's loss is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dryvine.trainer import verify
from dryvine.trainer.batches import read_batch
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.data.packed_tokens import PackedTokens
from dryvine.trainer.data.source import TokenSource
from dryvine.trainer.step import evaluate
from tests.support.datasets import write_dataset
from tests.support.documents import short_documents
from tests.support.rig import rig_of

Tiny = Callable[..., Config]


def test_windows_know_their_documents_across_shards(tmp_path: Path) -> None:
    write_dataset(tmp_path, [33, 40, 51])  # a document each
    packed = PackedTokens(tmp_path, "train")
    for start in range(0, 124, 5):
        for stop in (start + 1, min(start + 34, 124), 124):
            expected = [end for end in (33, 73, 124) if start < end < stop]
            assert packed.ends_between(start, stop).tolist() == expected
    source = TokenSource(tmp_path, "train", seq_len=10, extra=2, seed=5)
    numbers = source.documents(0, source.windows)
    owner = np.repeat([0, 1, 2], [33, 40, 51])
    for row, number in zip(numbers, range(source.windows), strict=True):
        start = source.order.window(number) * 10
        np.testing.assert_array_equal(row, owner[start : start + 12] - owner[start])


def test_a_real_corpus_ends_its_documents_where_its_end_tokens_are(corpus: Path) -> None:
    source = TokenSource(corpus, "train", seq_len=64, extra=2, seed=1)
    tokens, numbers = source.sequences(0, 200), source.documents(0, 200)
    ends = tokens[:, :-1] == source.packed.dataset.end_token
    np.testing.assert_array_equal(np.diff(numbers, axis=1) == 1, ends)


MASKED = ("data.mask=document", "batch.sequences=16")


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("parallel.pp=2", "parallel.schedule=dualpipe"), id="pp2", marks=pytest.mark.long),
        pytest.param(("parallel.dp=2", "parallel.schedule=dualpipev"), id="dp2", marks=pytest.mark.long),
        pytest.param(
            ("parallel.ep=2", "parallel.microbatch_sequences=2", 'model.recompute=["norm", "mla_up", "swiglu"]'),
            id="ep2",
        ),
    ],
)
def test_a_masked_run_trains_like_one_process(short: Tiny, layout: tuple[str, ...]) -> None:
    found = verify.compare(short(*MASKED, "model.layers=3", "batch.sequences=8", *layout))
    assert not [d for d in found if not d.fine]


@pytest.mark.long
@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe"),
        ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", 'model.recompute=["layer"]'),
        ("parallel.pp=2", "parallel.dp=2", "parallel.schedule=dualpipev"),
        ("parallel.pp=2", "parallel.dp=2", "parallel.schedule=zbv"),
        ("parallel.pp=2", "parallel.schedule=zb1p", "parallel.microbatch_sequences=2", 'model.recompute=["layer"]'),
        ("parallel.pp=4", "parallel.schedule=one_f_one_b"),
        ("parallel.pp=2", "parallel.chunks=2", "parallel.schedule=interleaved"),
        ("parallel.dp=2", "parallel.ep=2", "parallel.schedule=gpipe"),
    ],
    ids=lambda layout: " ".join(key.partition(".")[2] for key in layout),
)
def test_a_masked_run_trains_like_one_process_in_combined_layouts(short: Tiny, layout: tuple[str, ...]) -> None:
    found = verify.compare(short(*MASKED, *layout))
    assert not [d for d in found if not d.fine]


@pytest.fixture
def short(tiny: Tiny, tmp_path: Path) -> Tiny:
    """The tiny config on documents of a few tokens each."""
    folder = short_documents(tmp_path / "short")
    return lambda *overrides: tiny(f'data.source="{folder}"', *overrides)


def test_the_loss_is_the_mean_over_targets_inside_documents_whatever_the_microbatch(short: Tiny) -> None:
    """Microbatches with few such targets count for less."""
    losses = [evaluate(rig_of(short(*MASKED, f"parallel.microbatch_sequences={size}"))).loss for size in (1, 4, 16)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert evaluate(rig_of(short())).loss != pytest.approx(losses[0], rel=1e-4)


def test_weights_of_a_step_make_a_mean(short: Tiny) -> None:
    rig = rig_of(short(*MASKED, "parallel.microbatch_sequences=2"))
    batch = read_batch(rig, rig.data.train, 0, 16)
    for depth in (0, 1):
        weights = torch.stack([d.weights[depth] for d in batch.documents])  # type: ignore[union-attr, attr-defined]
        assert float(weights.mean()) == pytest.approx(1, rel=1e-6)
        assert len(weights.unique()) == 2
        assert 0.5 < float((weights > 0).float().mean()) < 0.95


def test_a_head_wider_than_the_kernel_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"no kernel for heads of nope_dim \+ rope_dim = 260"):
        tiny("data.mask=document", "model.nope_dim=256")
