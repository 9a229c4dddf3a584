"""Graphs of steps over documents, whose number and lengths differ in every microbatch, train as the same steps without:
pretraining with a document mask, and updates of reinforcement learning, whose rows share prompts and replay experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dryvine.trainer.config import Config
from dryvine.trainer.model.documents import ALONE, documents_of
from dryvine.trainer.ramps import points
from dryvine.trainer.rig import Rig
from dryvine.trainer.rl.choices import LossChoices
from dryvine.trainer.rl.passes import PassOptions, learn, score
from dryvine.trainer.step import train_step
from tests.support.answers import ODD, RL, answers_of, bare, odd_answers
from tests.support.documents import short_documents
from tests.support.recorded import as_on_a_gpu, attend_as_on_a_gpu, recorded_by
from tests.support.rig import rig_of
from tests.support.tape import TapeRecorder

Tiny = Callable[..., Config]
STEPS = 4
ONE = ("parallel.pp=1", "parallel.ep=1", "model.layers=2")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    attend_as_on_a_gpu(monkeypatch)


def weights_of(rig: Rig) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in rig.model.named_parameters()}


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    for (seen, weights), (expected, others) in zip(ours, theirs, strict=True):
        assert seen == expected
        for name, value in others.items():
            assert torch.equal(weights[name], value), name


# -- pretraining


def trained(rig: Rig) -> list[Any]:
    found = []
    for point in islice(points(rig.config.batch, rig.config.data.seq_len), STEPS):
        outcome = train_step(rig, point)
        losses = {name: [float(loss) for loss in many] for name, many in outcome.played.losses.items()}
        found.append(((losses, outcome.norm), weights_of(rig)))
    return found


@pytest.mark.parametrize("recompute", ["[]", "['norm','swiglu','mla_up']", "['layer']"])
def test_masked_steps_have_the_same_bits_as_graphs(tiny: Tiny, tmp_path: Path, recompute: str) -> None:
    source = f'data.source="{short_documents(tmp_path / "short")}"'
    words = (
        "data.mask=document",
        "batch.sequences=8",
        "parallel.microbatch_sequences=2",
        f"model.recompute={recompute}",
    )
    config, recorder = tiny(source, *ONE, *words), TapeRecorder()
    rig = recorded_by(recorder, rig_of(config))
    assert_same(trained(rig), trained(rig_of(config)))
    # All but the first step, which loads what graphs with documents need.
    assert recorder.replayed == (STEPS - 1) * 2 * 4


# -- updates

CHOICES = {
    "plain": LossChoices(aggregate="token_mean"),
    "all": LossChoices(kl=0.05, ratio="sequence", correction="truncate", correction_level="sequence", stale_mask=0.1),
}


def learnt(rig: Rig, choices: LossChoices) -> list[Any]:
    """Updates from answers of other numbers and lengths, with a forward pass before each."""
    found, plan = [], PassOptions(0.7, replay=True)
    for step, count in enumerate((12, 6, 24, 9, 24)):
        scored = score(rig, answers_of(rig.config, count, seed=step), plan)
        outcome = replace(learn(rig, scored, choices, plan, step), bubble=0.0)
        found.append((outcome, weights_of(rig)))
    return found


@pytest.mark.parametrize("choices", CHOICES)
def test_updates_have_the_same_bits_as_graphs(tiny: Tiny, choices: str) -> None:
    config, recorder = tiny(*RL, *ONE, "model.recompute=['mla_up']", "parallel.microbatch_sequences=4"), TapeRecorder()
    rig = recorded_by(recorder, bare(config))
    assert_same(learnt(rig, CHOICES[choices]), learnt(bare(config), CHOICES[choices]))
    assert recorder.replayed > 0
    # For the update without graphs, for the first one with graphs, and for the third, which has more of everything.
    assert recorder.freed == 3


def test_updates_from_answers_of_any_length_have_the_same_bits_as_graphs(tiny: Tiny) -> None:
    """A token beside one that fills a row to its last target; then one answer; then many more of one token, in graphs
    with room for all; then rows without any."""
    config = tiny(*ODD, *ONE, "parallel.microbatch_sequences=2")
    few = odd_answers(config, [(1, (1,))])
    many = odd_answers(config, [(p, (1,) * 9) for p in (1, 2, 3, 50)])

    def learnt(rig: Rig) -> list[Any]:
        found = []
        for step, answers in enumerate([few, odd_answers(config), few, many, odd_answers(config), few]):
            outcome = replace(learn(rig, answers, CHOICES["all"], PassOptions(0.7, replay=True), step), bubble=0.0)
            found.append((outcome, weights_of(rig)))
        return found

    recorder = TapeRecorder()
    assert_same(learnt(recorded_by(recorder, bare(config))), learnt(bare(config)))
    assert recorder.replayed > 0


# -- what is filled up


def test_room_for_documents_grows_in_steps_and_is_filled_with_empty_ones() -> None:
    numbers = np.array([[1, 1, 1, 2, 2, 3, 3, 3, 0, 0], [4, 4, 5, 5, 5, 6, 6, 7, 0, 0]])
    begins = np.array([[ALONE] * 3 + [0] * 5 + [ALONE] * 2, [ALONE] * 5 + [2] * 3 + [ALONE] * 2])
    shared = documents_of(numbers, [np.zeros((2, 9), np.float32)], "cpu", begins)
    # 18 tokens; 9 documents; 3 + 5 + 6 + 1 and 2 + 3 + 5 + 4 + 1 places, in steps of 2.
    assert shared.sizes() == (16, 30, 128)
    filled = shared.filled((32, 36, 256))
    assert filled.bounds.tolist() == [0, 3, 8, 14, 15, 17, 20, 25, 29, *[30] * 24]
    assert filled.longest == 256
    assert filled.packed is not None
    assert shared.packed is not None
    assert filled.packed.tokens.tolist() == [*shared.packed.tokens.tolist(), *[0] * 6]
    assert filled.packed.first[18:].tolist() == [30, 36, 36, 36]
    assert shared.kind == filled.kind
    alone = documents_of(numbers, [np.zeros((2, 9), np.float32)], "cpu")
    assert alone.sizes() == (16, 18, 128)
    assert alone.filled((16, 18, 128)).packed is None
    assert alone.kind != shared.kind
