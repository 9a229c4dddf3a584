"""The memory that copies of a run's state take on two nodes is what a plan says, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dryvine.comm import local
from dryvine.comm.topology import by_sizes
from dryvine.launch.plan.copies import BUFFER, IN_MEMORY, SAVES
from dryvine.launch.plan.hardware import load_hardware
from dryvine.launch.plan.memory import AVERAGES
from dryvine.launch.plan.plan import make
from dryvine.launch.plan.summary import headline
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.manifest import read_manifest
from dryvine.trainer.checkpoint.memory_saver import MemorySaver
from dryvine.trainer.checkpoint.save import Keep, Saver
from dryvine.trainer.config import Config
from dryvine.trainer.rig import make_rig, mesh_of
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.sources import open_sources

LAYOUT = ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", "comm.topology.nodes=[2, 2]")


def keep(rank: int, config: Config) -> tuple[int, int]:
    """For `local.run`: keep one step. Returns bytes of the buffer, and of all tensors of copies on this rank."""
    plan = make_plan(config)
    rig = make_rig(plan, mesh_of(plan, torch.device("cpu")), open_sources(config), by_sizes([2, 2]))
    saver = MemorySaver(config.run, rig.mesh, rig.node, rig.links, rig.data.identity)
    saver.begin(1, rig.state())
    saver.finish()
    buffer = sum(tensor.nbytes for tensor in saver._staging._copies.values())
    found = [path for home in saver._homes.values() for path in run_folder.complete(home)]
    return buffer, sum(tensor.bytes for path in found for tensor in read_manifest(path).tensors)


@pytest.mark.parametrize("overrides", [(), ("optim.ema=0.9", "optim.moments=bf16")], ids=["plain", "averaged"])
def test_copies_take_what_is_planned(tiny: Callable[..., Config], tmp_path: Path, overrides: tuple[str, ...]) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    config = tiny(*LAYOUT, "run.buddy_every=1", f'run.buddy_folder="{memory}"', *overrides)
    plan = make(make_plan(config), load_hardware("cpu"))
    measured = local.run(keep, 4, config, deadline=60)
    for pp_rank, planned in enumerate(plan.ranks):
        buffer, copies = measured[2 * pp_rank]
        assert planned.host[BUFFER] == buffer
        assert planned.host[IN_MEMORY] == 2 * copies
    assert any("host memory" in line and "run.buddy_every" in line for line in headline(plan))


def test_one_node_keeps_its_own_only(tiny: Callable[..., Config]) -> None:
    ranks = make(make_plan(tiny("parallel.pp=2", "run.buddy_every=1")), load_hardware("cpu")).ranks
    assert all(rank.host[IN_MEMORY] == 2 * rank.host[BUFFER] > 0 for rank in ranks)
    assert all([*rank.host] == [SAVES] for rank in make(make_plan(tiny("parallel.pp=2")), load_hardware("cpu")).ranks)


def save(rank: int, config: Config) -> tuple[int, int]:
    """For `local.run`: bytes of the buffer of checkpoints, and of averages with their copy."""
    plan = make_plan(config)
    rig = make_rig(plan, mesh_of(plan, torch.device("cpu")), open_sources(config))
    saver = Saver(config.run.folder, Keep(1, None), rig.mesh)
    saver.prepare(rig.state())
    ema = rig.optimizer.ema
    averages = [] if ema is None else [*ema.averages, *ema._copies]
    return sum(t.nbytes for t in saver._staging._copies.values()), sum(t.nbytes for t in averages)


@pytest.mark.parametrize("overrides", [(), ("optim.ema=0.9", "optim.moments=bf16")], ids=["plain", "averaged"])
def test_saves_and_averages_take_what_is_planned(tiny: Callable[..., Config], overrides: tuple[str, ...]) -> None:
    config = tiny("parallel.pp=2", "parallel.schedule=dualpipe", *overrides)
    plan = make(make_plan(config), load_hardware("cpu"))
    measured = local.run(save, 2, config, deadline=60)
    assert [(r.host[SAVES], r.host.get(AVERAGES, 0)) for r in plan.ranks] == measured
    assert bool(measured[0][1]) is bool(overrides)
