"""Steps whose ops are replayed train, bit for bit, as steps whose phases are called: on graphs as a CPU plays them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from dryvine.comm.dispatch.single_rank import SingleRank
from dryvine.trainer.batches import read_batch
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.graphed import obstacle
from dryvine.trainer.ramps import points
from dryvine.trainer.rig import Rig
from dryvine.trainer.step import accumulate, train_step
from tests.support.recorded import as_on_a_gpu, recorded_by
from tests.support.rig import rig_of
from tests.support.tape import TapeRecorder

Tiny = Callable[..., Config]
STEPS = 2
SMALL = ("model.layers=2", "batch.sequences=4")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)


def state(rig: Rig) -> dict[str, Tensor]:
    found = {name: w.detach().clone() for name, w in rig.model.named_parameters()}
    found |= {f"grad {name}": w.gradient().clone() for name, w in rig.model.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in rig.model.buffers.items()}


def trained(rig: Rig) -> list[Any]:
    """What a step returns and leaves, of each."""
    seen: list[Any] = []
    for point in islice(points(rig.config.batch, rig.config.data.seq_len), STEPS):
        outcome = train_step(rig, point)
        losses = {name: [float(loss) for loss in many] for name, many in outcome.played.losses.items()}
        seen.append([losses, outcome.norm, outcome.loads, rig.dispatcher.meter.take(), state(rig)])
    return seen


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    for mine, plain in zip(ours, theirs, strict=True):
        assert mine[:2] == plain[:2]
        assert torch.equal(mine[2], plain[2])
        assert mine[3] == plain[3]
        for name, value in plain[4].items():
            assert torch.equal(mine[4][name], value), name


def one_rank(tiny: Tiny, schedule: str, *more: str) -> Config:
    name, *rest = schedule.split()
    return tiny("parallel.pp=1", "parallel.ep=1", f"parallel.schedule={name}", *rest, *more)


# The graphs: kinds of ops times flights of a stage under way at once. One rank has no bubble to fill: each schedule
# but DualPipeV has a single flight in each stage.
SCHEDULES = {"one_f_one_b": 2, "zb1p": 3, "dualpipev": 10, "interleaved parallel.chunks=2": 6}
RECOMPUTE = "model.recompute=['norm','swiglu','mla_up']"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_replayed_steps_have_the_same_bits(tiny: Tiny, schedule: str) -> None:
    config, recorder = one_rank(tiny, schedule, *SMALL, RECOMPUTE), TapeRecorder()
    rig = recorded_by(recorder, rig_of(config))
    assert_same(trained(rig), trained(rig_of(config)))
    assert rig.graphs is not None
    assert rig.graphs.count == SCHEDULES[schedule]
    # Every op of both steps was replayed, recorded or not.
    assert recorder.replayed == STEPS * len(list(rig.plan.training[config.batch.sequences].schedule.ops(0)))


def test_what_is_a_number_in_a_graph_makes_new_graphs_when_it_changes(tiny: Tiny) -> None:
    changes = "optim.mtp_weight_plan=[{after=128, to=0.1}]"
    config, recorder = one_rank(tiny, "one_f_one_b", *SMALL, changes), TapeRecorder()
    rig = recorded_by(recorder, rig_of(config))
    assert_same(trained(rig), trained(rig_of(config)))
    assert recorder.freed == 2


def test_a_step_without_graphs_gives_their_memory_back(tiny: Tiny) -> None:
    config, recorder = one_rank(tiny, "one_f_one_b", *SMALL), TapeRecorder()
    rig = recorded_by(recorder, rig_of(config))
    first, second = islice(points(config.batch, config.data.seq_len), 2)
    accumulate(rig, first)
    assert rig.graphs is not None
    assert rig.graphs.count == 2
    batch = read_batch(rig, rig.data.train, second.first, second.sequences)
    rig.training(second.sequences).run(replace(batch, eager=True))
    assert (rig.graphs.count, recorder.freed) == (0, 2)


def test_graphs_that_are_asked_for_and_cannot_be_are_refused_in_a_line(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"parallel.graphs = 'on': the device is a cpu; set parallel.graphs = 'auto'"):
        rig_of(one_rank(tiny, "one_f_one_b", "parallel.graphs=on"))


@pytest.mark.parametrize(
    ("capability", "why"),
    [((9, 0), None), ((8, 0), "GPUs other than Hopper"), ((10, 0), "GPUs other than Hopper"), ((12, 0), "than Hopper")],
)
def test_a_gpu_whose_products_read_counts_has_no_graphs(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], why: str | None
) -> None:
    """`auto` would fail while it records: torch's loop over experts, and ours for weight gradients, read the device."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = one_rank(tiny, "one_f_one_b", "run.dtype=bf16", "run.device=cuda")
    found = obstacle(config, torch.device("cuda"), SingleRank(4), None)
    assert found is None if why is None else why in str(found)
