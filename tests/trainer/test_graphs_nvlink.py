"""Ops with messages, replayed: recordings as a CPU plays them (`support.tape`), with `nvlink`'s messages between their
parts. Files stand in for GPUs' memory and threads for copy engines (`support.host_links`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dryvine.comm import local
from dryvine.comm.dispatch import nvlink, payload, token_plan
from dryvine.comm.dispatch.nvlink import Nvlink
from dryvine.parallel.graphs import Graphs
from dryvine.trainer.config import Config
from dryvine.trainer.model import grouped
from dryvine.trainer.ramps import points
from dryvine.trainer.rig import Rig
from dryvine.trainer.step import train_step
from tests.support.host_links import open_host_links
from tests.support.masked_experts import add_masked_product, masked_product
from tests.support.rig import rig_of
from tests.support.tape import TapeRecorder

Tiny = Callable[..., Config]
LAYOUTS = [(1, "one_f_one_b"), (1, "zb1p"), (1, "dualpipev"), (2, "dualpipe")]


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """`payload.gather` without a size that depends on how many rows there are."""
    picked = rows.index_select(0, index.clamp(min=0))
    return torch.where((index < 0).view(-1, *[1] * (rows.dim() - 1)), 0, picked)


@contextmanager
def _as_on_a_gpu(folder: Path) -> Iterator[None]:
    """Memory that ranks share, and experts whose rows the host does not count, recorded or not."""
    with (
        mock.patch.object(nvlink, "open_links", partial(open_host_links, folder)),
        mock.patch.object(nvlink, "gather", _gather),
        mock.patch.object(payload, "gather", _gather),
        mock.patch.object(token_plan, "plan", token_plan.unread),
        mock.patch.object(grouped, "grouped_product", masked_product),
        mock.patch.object(grouped, "add_grouped_product", add_masked_product),
    ):
        yield


def _recorded(rig: Rig) -> TapeRecorder:
    assert isinstance(rig.dispatcher, Nvlink)
    recorder = TapeRecorder(rig.dispatcher.windows.live)
    rig.graphs = Graphs(recorder, rig.dispatcher.meter, lambda: rig.model.loss_weights.mtp)
    rig.graphs.loaded = True
    return recorder


def trained(rank: int, folder: Path, config: Config, graphs: bool) -> tuple[list[Any], dict[str, Any], int]:
    """Losses, norm and bytes of each step; weights; and how many replays there were."""
    with _as_on_a_gpu(folder):
        rig, seen = rig_of(config), []
        recorder = _recorded(rig) if graphs else None
        for point in islice(points(rig.config.batch, rig.config.data.seq_len), 2):
            outcome = train_step(rig, point)
            losses = {name: [float(loss) for loss in many] for name, many in outcome.played.losses.items()}
            seen.append([losses, outcome.norm, rig.dispatcher.meter.take()])
            assert outcome.played.exposed > 0, "the waits for messages are not measured"
        rig.optimizer.zero.settle()
        weights = {name: w.detach().numpy().copy() for name, w in rig.model.named_parameters()}
        return seen, weights, recorder.replayed if recorder else 0


@pytest.mark.parametrize(("pp", "schedule"), LAYOUTS)
def test_replayed_ops_with_messages_have_the_same_bits(tiny: Tiny, tmp_path: Path, pp: int, schedule: str) -> None:
    """Pairs too, whose ops take turns."""
    layout = (f"parallel.pp={pp}", "parallel.ep=2", f"parallel.schedule={schedule}")
    config = tiny(*layout, "comm.dispatcher=nvlink", "model.layers=4", "batch.sequences=8")
    plain, replayed = (local.run(trained, 2 * pp, tmp_path, config, graphs) for graphs in (False, True))
    for (seen, weights, none), (again, same, replays) in zip(plain, replayed, strict=True):
        assert again == seen
        assert none == 0
        assert replays > 0
        for name, value in weights.items():
            assert (value == same[name]).all(), name
