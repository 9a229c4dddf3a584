"""Blends keep their shares over every prefix, are found again at any number, and train alike in every layout."""

from __future__ import annotations

import hashlib
import json
import math
import random
import sysconfig
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dryvine.trainer import journal, verify
from dryvine.trainer.batches import read_batch
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.data.blend import Blend, BlendPart
from dryvine.trainer.data.blend_order import BlendOrder, whole_weights
from dryvine.trainer.data.build import build
from dryvine.trainer.data.config import BlendEntry, DataError
from dryvine.trainer.data.fair_rounding import round_along
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.source import TokenSource
from dryvine.trainer.data.spec import BuildSpec
from dryvine.trainer.data.splits import open_data
from dryvine.trainer.rig import Rig
from tests.support.datasets import write_dataset
from tests.support.rig import train_on

Tiny = Callable[..., Config]
WEIGHTS = st.lists(st.one_of(st.integers(1, 9), st.floats(1e-4, 1.0), st.integers(1, 10**9)), min_size=2, max_size=50)


def order_of(weights: list[float]) -> BlendOrder | None:
    whole = whole_weights([Fraction(repr(weight)) for weight in weights])
    return BlendOrder(whole) if max(whole) < 3000 * min(whole) else None  # larger blocks take seconds each


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, far=st.integers(0, 10**9), data=st.data())
def test_every_prefix_of_every_blend_has_its_shares(weights: list[float], far: int, data: st.DataObject) -> None:
    order = order_of(weights)
    if order is None:
        return
    total = sum(map(Fraction, map(repr, weights)))
    edge = order.length * (far // order.length)
    near = st.integers(max(0, edge - 70), edge + order.length)
    for length in (edge, data.draw(near), data.draw(near)):
        counts = order.counts(length)
        assert sum(counts) == length
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - length * Fraction(repr(weight)) / total) < 1 + Fraction(1, 1000)


@settings(max_examples=30, deadline=None)
@given(weights=WEIGHTS, far=st.integers(0, 10**9))
def test_a_resume_finds_its_place_without_the_way_there(weights: list[float], far: int) -> None:
    if (walked := order_of(weights)) is None or (resumed := order_of(weights)) is None:
        return
    start = walked.length * (far // walked.length + 1) - 20
    counts = walked.counts(start)
    for number in range(start, start + 40):  # over the edge of a block
        source, index = resumed.place(number)
        assert index == counts[source]
        counts[source] += 1
        assert counts == walked.counts(number + 1)


@pytest.mark.parametrize("weights", [[50, 49, 1], [1, 2500, 2499]], ids=["of 100", "a rare one"])
def test_a_share_is_kept_at_every_single_prefix(weights: list[int]) -> None:
    """Also of a source that has one sequence in thousands, over the edges of its blocks."""
    order, counts = BlendOrder(weights), [0, 0, 0]
    for number in range(3 * order.length):
        counts[order.place(number).source] += 1
        assert all(abs(count - (number + 1) * w / sum(weights)) < 1 for count, w in zip(counts, weights, strict=True))


def test_the_blend_order_never_changes() -> None:
    """A run that is resumed by a later version goes on where it was."""
    order = BlendOrder([6, 3, 1])
    assert [order.place(n).source for n in range(10)] == [0, 0, 1, 0, 1, 0, 0, 1, 0, 2]
    assert order.place(10**12) == (0, 600000000000)
    many = [28, 13, 25, 29, 14, 2, 9, 17, 16, 13, 30, 26, 27, 10, 16, 12, 19, 29, 30, 7]
    for weights, digest in (
        ([50, 49, 1, 7, 3], "65c0f1e81e2cbac9"),
        ([1, 2500, 2499], "6f0a17d65f739be9"),
        (many, "a19cefc303c20fed"),
    ):
        order = BlendOrder(weights)
        sources = bytes(order.place(n).source for n in range(3 * order.length))
        assert hashlib.sha256(sources).hexdigest()[:16] == digest


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 30), seed=st.integers(0, 10**6))
def test_sums_along_both_orders_are_rounded_to_their_neighbours(size: int, seed: int) -> None:
    draw, whole = random.Random(seed), 1000
    parts = [draw.randrange(whole) for _ in range(size)]
    parts[-1] = (parts[-1] - sum(parts)) % whole
    orders = tuple(draw.sample(range(size), size) for _ in range(2))
    rounded = round_along((orders[0], orders[1]), parts, whole)
    assert set(rounded) <= {0, 1}
    for order in orders:
        for length in range(1, size + 1):
            exact = Fraction(sum(parts[i] for i in order[:length]), whole)
            assert math.floor(exact) <= sum(rounded[i] for i in order[:length]) <= math.ceil(exact)


def test_weights_are_the_decimals_that_were_typed() -> None:
    assert whole_weights([Fraction("0.7"), Fraction("0.25"), Fraction("0.05")]) == [14, 5, 1]
    rounded = whole_weights([Fraction(1, 3), Fraction("0.123456789012345")])
    assert sum(rounded) < 2**40
    assert rounded[0] / sum(rounded) == pytest.approx((1 / 3) / (1 / 3 + 0.123456789012345), rel=1e-11)


def blend_of(folder: Path, amounts: list[dict[str, float]], tokens: list[int]) -> Blend:
    parts = []
    for index, (amount, size) in enumerate(zip(amounts, tokens, strict=True)):
        write_dataset(folder / str(index), [size])
        source = TokenSource(folder / str(index), "train", seq_len=10, extra=1, seed=3, stream=index)
        parts.append(BlendPart(BlendEntry.model_validate({"source": str(folder / str(index)), **amount}), source))
    return Blend(parts)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(21, 200), min_size=2, max_size=50), seed=st.integers(0, 1000))
def test_nothing_is_read_twice_in_an_epoch_and_nothing_left_out(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int
) -> None:
    draw = random.Random(seed)
    amounts = [{"weight": draw.choice([1, 2, 0.5, 7])} for _ in sizes]
    blend = blend_of(tmp_path_factory.mktemp("blend"), amounts, sizes)
    read: list[list[int]] = [[] for _ in sizes]
    number = 0
    while any(len(seen) < 2 * part.source.windows for seen, part in zip(read, blend.parts, strict=True)):
        source, index = blend.order.place(number)
        read[source].append(blend.parts[source].source.order.window(index))
        number += 1
    for seen, part in zip(read, blend.parts, strict=True):
        windows = part.source.windows
        assert sorted(seen[:windows]) == sorted(seen[windows : 2 * windows]) == list(range(windows))


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(21, 200), min_size=2, max_size=50), seed=st.integers(0, 1000))
def test_amounts_are_kept_to_the_sequence_and_read_without_repetition(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int
) -> None:
    draw = random.Random(seed)
    amounts = [draw.choice([{"epochs": 1}, {"epochs": 0.5}, {"tokens": draw.randint(1, 20)}]) for _ in sizes]
    blend = blend_of(tmp_path_factory.mktemp("blend"), amounts, sizes)
    wanted = [
        max(1, int(amount["tokens"] / 10 if "tokens" in amount else amount["epochs"] * part.source.windows))
        for amount, part in zip(amounts, blend.parts, strict=True)
    ]
    assert blend.limit == sum(wanted)
    read = [blend.order.place(number) for number in range(blend.limit)]
    assert Counter(place.source for place in read) == dict(enumerate(wanted))
    assert len(set(read)) == len(read)


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.integers(1, 30), min_size=2, max_size=12),
    data_ranks=st.sampled_from([1, 2, 4]),
    size=st.sampled_from([1, 2, 3]),
    steps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_every_layout_reads_the_same_set_at_every_step(
    tmp_path_factory: pytest.TempPathFactory,
    weights: list[int],
    data_ranks: int,
    size: int,
    steps: tuple[int, int],
) -> None:
    """As read_batch reads it, with a batch that grows from the first step to the second."""
    amounts = [{"weight": weight} for weight in weights]
    blend = blend_of(tmp_path_factory.mktemp("blend"), amounts, [31 + 10 * i for i in range(len(weights))])
    first = 7
    for microbatches in steps:
        sequences = microbatches * data_ranks * size
        ranks = [microbatches_of(blend, rank, data_ranks, size, first, sequences) for rank in range(data_ranks)]
        assert {len(microbatches_read) for microbatches_read in ranks} == {microbatches}
        read = sorted(row.tolist() for rank in ranks for batch in rank for row in batch)
        assert read == sorted(blend.sequences(first, sequences).tolist())
        first += sequences


def microbatches_of(
    blend: Blend, rank: int, data_ranks: int, size: int, first: int, sequences: int
) -> Sequence[torch.Tensor]:
    config = SimpleNamespace(parallel=SimpleNamespace(microbatch_sequences=size), data=SimpleNamespace(mask="none"))
    rig = SimpleNamespace(config=config, mesh=SimpleNamespace(data_rank=rank, data_ranks=data_ranks, device="cpu"))
    return read_batch(cast(Rig, rig), blend, first, sequences).tokens


def test_epochs_and_tokens_are_counts_of_the_whole_run(tmp_path: Path) -> None:
    blend = blend_of(tmp_path, [{"epochs": 2}, {"epochs": 0.5}, {"tokens": 70}], [201, 401, 101])
    assert blend.limit == 2 * 20 + 20 + 7
    places = Counter(blend.order.place(n).source for n in range(blend.limit))
    assert places == {0: 40, 1: 20, 2: 7}
    rows = Counter(tuple(row) for row in blend.sequences(0, blend.limit)[:, :10].tolist())
    assert sum(rows.values()) == 67
    blend.check_length(67)
    with pytest.raises(DataError, match="make 67 sequences, and the run reads 68"):
        blend.check_length(68)


def test_strides_of_a_layout_read_the_same_sequences(tmp_path: Path) -> None:
    blend = blend_of(tmp_path, [{"weight": 0.6}, {"weight": 0.4}], [900, 1700])
    whole = blend.sequences(5, 12)
    for rank in range(4):
        np.testing.assert_array_equal(blend.sequences(5 + rank, 3, stride=4), whole[rank::4])


def test_weights_of_a_config_are_the_decimals_that_were_typed(tmp_path: Path) -> None:
    blend = blend_of(tmp_path, [{"weight": 0.7}, {"weight": 0.25}, {"weight": 0.05}], [30, 30, 30])
    assert blend.order.weights == (14, 5, 1)


def test_sources_of_one_length_are_not_read_in_step(tmp_path: Path) -> None:
    blend = blend_of(tmp_path, [{"weight": 1}, {"weight": 1}], [4001, 4001])
    first, second = ([part.source.order.window(i) for i in range(400)] for part in blend.parts)
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20


def test_a_source_too_rare_for_any_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 is less than a millionth of the blend"):
        blend_of(tmp_path, [{"weight": 1}, {"weight": 1e-7}], [30, 30])


# -- in a run


@pytest.fixture(scope="module")
def second(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text, with the tokenizer of `corpus`."""
    folder = tmp_path_factory.mktemp("second")
    inputs = match_files([str(Path(sysconfig.get_path("stdlib")) / "t*.py")])
    build(inputs, BuildSpec(tokenizer=corpus / "tokenizer.json", validation_fraction=0.3), folder)
    return folder


@pytest.fixture
def blended(tiny: Tiny, corpus: Path, second: Path) -> Tiny:
    entries = f'[{{source="{corpus}", weight=3, name="a"}}, {{source="{second}", weight=1, name="t"}}]'
    return lambda *overrides: tiny(f"data.blend={entries}", *overrides)


def test_a_blend_trains_alike_in_another_layout(blended: Tiny) -> None:
    config = blended("parallel.pp=2", "parallel.schedule=dualpipe", "model.layers=3", "batch.sequences=8")
    found = verify.compare(config)
    assert not [d for d in found if not d.fine]


def _rows(config: Config, name: str, steps: int) -> list[journal.Figures]:
    run = config.run.model_copy(update={"name": name, "steps": steps})
    config = config.model_copy(update={"run": run})
    train_on(0, config)
    return journal.read(config.run.folder)


@pytest.mark.long
def test_a_run_of_a_blend_resumes_and_has_a_validation_loss_for_each_source(blended: Tiny) -> None:
    config = blended("run.checkpoint_every=2", "run.eval_every=2")
    whole = _rows(config, "whole", 4)
    _rows(config, "parts", 2)
    parts = _rows(config, "parts", 4)
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    last = whole[-1]
    assert last["val_loss.a"] != last["val_loss.t"]
    assert last["val_loss"] == pytest.approx(0.75 * last["val_loss.a"] + 0.25 * last["val_loss.t"], rel=1e-9)
    assert (config.run.folder.parent / "whole" / "loss.png").exists()


def test_what_a_source_gives_is_said_before_the_start(blended: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    data = open_data(blended())
    assert isinstance(data.train, Blend)
    lines = list(data.train.lines(96))
    assert lines[0].startswith("data.blend: a  75.00%, 72 of 96 sequences")
    windows = data.train.parts[1].source.windows
    (line,) = [line for line in data.train.lines(8 * windows) if "data.blend: t" in line]
    assert f"2.00 epochs of {windows:,}; runs out and is read again" in line
    (line,) = [line for line in data.train.lines(4 * windows) if "data.blend: t" in line]
    assert line.endswith(f"1.00 epochs of {windows:,}")


def test_sources_of_a_run_have_orders_of_their_own(tiny: Tiny, corpus: Path) -> None:
    entries = f'[{{source="{corpus}", weight=1, name="a"}}, {{source="{corpus}", weight=1, name="b"}}]'
    data = open_data(tiny(f"data.blend={entries}"))
    assert isinstance(data.train, Blend)
    first, second = ([part.source.order.window(i) for i in range(50)] for part in data.train.parts)
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 5


def test_the_validation_loss_is_shared_out_among_sources_that_hold_text_out(
    tiny: Tiny, corpus: Path, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "few", [200])
    sha256 = json.loads((corpus / "dataset.json").read_text())["tokenizer_sha256"]
    described = json.loads((tmp_path / "few" / "dataset.json").read_text()) | {"tokenizer_sha256": sha256}
    (tmp_path / "few" / "dataset.json").write_text(json.dumps(described))
    sources = ((corpus, 3, "a"), (corpus, 1, "b"), (tmp_path / "few", 4, "few"))
    entries = ", ".join(f'{{source="{source}", weight={weight}, name="{name}"}}' for source, weight, name in sources)
    found = open_data(tiny(f"data.blend=[{entries}]")).held_out
    assert {name: held_out.share for name, held_out in found.items()} == {"a": 0.75, "b": 0.25}


def test_a_run_longer_than_its_blend_is_refused(tiny: Tiny, corpus: Path) -> None:
    with pytest.raises(DataError, match=r"make 10 sequences, and the run reads 96 \(3,072 tokens\); lower run\.steps"):
        open_data(tiny(f'data.blend=[{{source="{corpus}", tokens=320}}]'))


def test_sources_with_other_tokenizers_are_refused(tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    inputs = match_files([str(Path(sysconfig.get_path("stdlib")) / "u*.py")])
    build(inputs, BuildSpec(vocab_size=300, validation_fraction=0.3), tmp_path / "other")
    with pytest.raises(DataError, match=r"other and .* have different tokenizers"):
        open_data(tiny(f'data.blend=[{{source="{corpus}", weight=1}}, {{source="{tmp_path}/other", weight=1}}]'))


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ('[{source="a", weight=1}, {source="b", tokens=5}]', "weight beside tokens or epochs"),
        ('[{source="a/x", weight=1}, {source="b/x", weight=5}]', "two sources are called x"),
        ('[{source="a", weight=1, epochs=2}]', "a: give one of weight, tokens and epochs"),
        ('[{source="a"}]', "a: give one of weight, tokens and epochs"),
        ('[{source="a", weight=0}]', "greater than 0"),
        ('[{source="a", wieght=1}]', "did you mean weight"),
    ],
)
def test_a_blend_that_means_nothing_is_refused(tiny: Tiny, entries: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        tiny(f"data.blend={entries}")
