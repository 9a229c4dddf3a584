"""One rank of a run in this process, or as one of several."""

from __future__ import annotations

from itertools import islice

import torch

from dryvine.trainer.config import Config
from dryvine.trainer.loop import train
from dryvine.trainer.ramps import points
from dryvine.trainer.rig import Rig, make_rig, mesh_of
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.sources import open_sources
from dryvine.trainer.step import train_step


def rig_of(config: Config, device: str = "cpu") -> Rig:
    plan = make_plan(config)
    return make_rig(plan, mesh_of(plan, torch.device(device)), open_sources(config))


def go(rig: Rig, steps: int) -> list[float]:
    """Train. Returns this rank's summed losses of each step."""
    sums = []
    for point in islice(points(rig.config.batch, rig.config.data.seq_len), steps):
        played = train_step(rig, point).played
        sums.append(sum(float(loss) for losses in played.losses.values() for loss in losses))
    rig.optimizer.zero.settle()
    return sums


def train_on(rank: int, config: Config) -> None:
    """For `local.run`: a rank of a whole run."""
    plan = make_plan(config)
    train(plan, mesh_of(plan, torch.device("cpu")), open_sources(config))
