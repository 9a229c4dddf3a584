"""One rank of a run in this process, or as one of several."""

from __future__ import annotations

from datetime import timedelta
from itertools import islice

import torch

from dryvine.comm.mesh import Mesh, make_mesh
from dryvine.trainer.config import Config
from dryvine.trainer.loop import train
from dryvine.trainer.ramps import points
from dryvine.trainer.step import Rig, make_rig, make_schedule, open_data, train_step


def mesh_of(config: Config, device: str = "cpu") -> Mesh:
    p = config.parallel
    routes = len(make_schedule(config, config.microbatches(config.batch.sequences)).routes)
    return make_mesh(p.pp, p.dp, p.ep, routes, torch.device(device), timedelta(seconds=100))


def rig_of(config: Config, device: str = "cpu") -> Rig:
    return make_rig(config, mesh_of(config, device), open_data(config))


def go(rig: Rig, steps: int) -> list[float]:
    """Train and give this rank's summed losses, a step each."""
    found = []
    for point in islice(points(rig.config.batch, rig.config.data.seq_len), steps):
        played, _, _ = train_step(rig, point)
        found.append(sum(float(loss) for losses in played.losses.values() for loss in losses))
    return found


def train_on(rank: int, config: Config) -> None:
    """For `local.run`: a rank of a whole run."""
    train(config, mesh_of(config), open_data(config))
