"""A dispatcher, an FP8 engine, a schedule and a kind of block are each one file and one line: written here to a
temporary folder, entered in the table of their kind, and trained with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

from dryvine.comm import local
from dryvine.comm.dispatch.backends import BACKENDS
from dryvine.parallel.schedule.table import SCHEDULES
from dryvine.trainer.config import Config
from dryvine.trainer.fp8.engines.names import ENGINES
from dryvine.trainer.model import decoder
from dryvine.trainer.model.shape import Block, Shape, blocks
from dryvine.trainer.ramps import points
from dryvine.trainer.step import train_step
from tests.support.rig import rig_of

Tiny = Callable[..., Config]
SMALL = ("model.layers=2", "batch.sequences=4")

DISPATCHER = '''
"""Every rank gets the rows of all and keeps those of its experts; sums are made over all ranks."""
import torch
import torch.distributed as dist
from dryvine.comm.pending import Pending

class Handle:
    def __init__(self, counts, pairs, top_k):
        self.counts, self.pairs, self.top_k = counts, pairs, top_k

class Everywhere:
    def __init__(self, setup):
        self.mesh, self.meter, self.links = setup.mesh, setup.meter, setup.links
        self.share = setup.experts // setup.mesh.ep

    def plan_routing(self, experts_TK, label=""):
        local = self._of_all(experts_TK).flatten() - self.mesh.ep_rank * self.share
        # By expert; equal ones stay by rank and token.
        order = local.argsort(stable=True)
        pairs = order[(local[order] >= 0) & (local[order] < self.share)]
        counts = torch.bincount(local[pairs], minlength=self.share).tolist()
        return Pending.done(Handle(counts, pairs, experts_TK.shape[1]))

    def dispatch(self, rows, pairs, handle):
        sent = tuple(self._of_all(part)[handle.pairs // handle.top_k] for part in rows)
        return Pending.done(sent if pairs is None else (*sent, self._of_all(pairs).flatten()[handle.pairs]))

    def combine(self, rows, pairs, handle):
        summed = self._to_own(rows.float(), handle.pairs // handle.top_k).to(rows.dtype)
        if pairs is None:
            return Pending.done((summed,))
        return Pending.done((summed, self._to_own(pairs, handle.pairs, handle.top_k).view(-1, handle.top_k)))

    def _of_all(self, part):
        every = [torch.empty_like(part) for _ in range(self.mesh.ep)]
        dist.all_gather(every, part.contiguous(), group=self.mesh.experts)
        self.meter.add(self.links, [len(part)] * self.mesh.ep, part[0].nbytes)
        return torch.cat(every)

    def _to_own(self, values, places, each=1):
        total = torch.zeros(self.mesh.ep * TOKENS * each, *values.shape[1:]).index_add_(0, places, values)
        dist.all_reduce(total, group=self.mesh.experts)
        return total.chunk(self.mesh.ep)[self.mesh.ep_rank]

TOKENS = 32

def build(setup):
    return Everywhere(setup)
'''

ENGINE = '''
"""Products in FP64."""
from dryvine.trainer.fp8.engines.in_turn import InTurn

class Exact(InTurn):
    @staticmethod
    def missing(device):
        return None

    def single(self, a, b, dtype):
        return (a.dequantize().double() @ b.dequantize().double().t()).to(dtype)
'''

SCHEDULE = '''
"""GPipe whose last microbatch goes back first."""
from dryvine.parallel.schedule.ir import Op, Schedule
from dryvine.parallel.schedule.rules import Generator, one_chunk, straight

def _make(sizes):
    numbers = range(sizes.microbatches)
    order = [*(("F", m) for m in numbers), *(("B", m) for m in reversed(numbers))]
    ranks = tuple(tuple((Op(kind, rank, m),) for kind, m in order) for rank in range(sizes.pp))
    return Schedule("lifo", sizes.microbatches, straight(sizes.pp), ranks)

lifo = Generator(_make, one_chunk, "chunks 1")
'''

BLOCK = '''
"""Each token sees the one before it."""
from torch import nn
from dryvine.trainer.model.linear import linear

class Mixer(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.norm = spec.norm(spec.shape.hidden)
        self.weight = spec.weight(spec.shape.hidden, spec.shape.hidden)

    def forward(self, x_NH, sequences):
        before = self.norm(x_NH).x.unflatten(0, (sequences, -1)).roll(1, 1).flatten(0, 1)
        return x_NH + linear(before, self.weight)

def mixer(rank, name):
    return [rank.local("mixer", name, rank.module(name, lambda: Mixer(rank.spec)))]
'''


def with_a_mixer(shape: Shape) -> tuple[Block, ...]:
    return tuple(block._replace(kind="mine") if block.kind == "dense" else block for block in blocks(shape))


class Stepped(NamedTuple):
    loss: float  # this rank's sum
    norm: float
    moved: set[str]  # parameters of which this rank has moved a part


def _step(rank: int, config: Config, module: Path | None = None) -> Stepped:
    """The first step of a run, where the file `module` is imported and its line is in the table."""
    if module:
        sys.path.insert(0, str(module.parent))
        match module.stem:
            case "everywhere":
                BACKENDS["mine"] = "everywhere"
            case "exact":
                ENGINES["mine"] = "exact:Exact"
            case "lifo":
                SCHEDULES["mine"] = import_module("lifo").lifo
            case "mixer":
                decoder.BLOCKS["mine"] = import_module("mixer").mixer
                decoder.blocks = with_a_mixer
    rig = rig_of(config)
    before = [piece.master.clone() for piece in rig.optimizer.pieces]
    outcome = train_step(rig, next(points(config.batch, config.data.seq_len)))
    loss = sum(float(loss) for losses in outcome.played.losses.values() for loss in losses)
    pairs = zip(rig.optimizer.pieces, before, strict=True)
    return Stepped(loss, outcome.norm, {piece.name for piece, old in pairs if not piece.master.equal(old)})


def steps_with(module: Path, text: str, config: Config) -> tuple[float, float, set[str]]:
    """Loss, gradient norm, and what has moved on any rank."""
    module.write_text(text)
    ranks = local.run(_step, config.parallel.world, config, module, deadline=100)
    return sum(one.loss for one in ranks), ranks[0].norm, set().union(*(one.moved for one in ranks))


def close_to(reference: Stepped) -> tuple[float, float, set[str]]:
    return pytest.approx(reference.loss, rel=1e-5), pytest.approx(reference.norm, rel=1e-5), reference.moved


def test_a_new_dispatcher_trains(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "mine", "everywhere")
    config = tiny(*SMALL, "comm.dispatcher=mine", "parallel.ep=2")
    assert steps_with(tmp_path / "everywhere.py", DISPATCHER, config) == close_to(_step(0, tiny(*SMALL)))


def test_a_new_engine_trains(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It rounds as the emulation does, but for the order of FP32 additions."""
    monkeypatch.setitem(ENGINES, "mine", "exact:Exact")
    fp8 = (*SMALL, "run.dtype=bf16", "fp8.preset=deepseek_v3")
    mine, emulated = (tiny(*fp8, f"fp8.gemm={engine}") for engine in ("mine", "emulate"))
    loss, norm, moved = steps_with(tmp_path / "exact.py", ENGINE, mine)
    reference = _step(0, emulated)
    assert loss == pytest.approx(reference.loss, rel=1e-4)
    assert norm == pytest.approx(reference.norm, rel=1e-2)
    assert moved == reference.moved


def test_a_new_schedule_trains(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(*SMALL, "parallel.schedule=mine", "parallel.pp=2")
    assert steps_with(tmp_path / "lifo.py", SCHEDULE, config) == close_to(_step(0, tiny(*SMALL)))


def test_a_new_kind_of_block_trains(tiny: Tiny, tmp_path: Path) -> None:
    loss, norm, moved = steps_with(tmp_path / "mixer.py", BLOCK, tiny(*SMALL))
    assert 0 < norm < loss
    assert {"layers.0.weight", "layers.0.norm.weight"} <= moved
    assert "layers.0.attention.o.weight" not in moved
