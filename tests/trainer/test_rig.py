"""What of a config reaches the parts of a run: groups, buffers of the dispatcher, the order inside pairs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from unittest import mock

import pytest
import torch

from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.mesh import Layout
from dryvine.parallel.overlap import ORDERS
from dryvine.trainer import rig
from dryvine.trainer.config import Config
from dryvine.trainer.rig import mesh_of
from dryvine.trainer.run_plan import make_plan
from tests.support.rig import rig_of

Tiny = Callable[..., Config]
CPU = torch.device("cpu")


def test_groups_are_made_of_the_layout_with_its_deadline_and_sms(tiny: Tiny) -> None:
    ranks = ("parallel.pp=2", "parallel.dp=3", "parallel.ep=4", "parallel.schedule=dualpipe", "batch.sequences=48")
    with mock.patch.object(rig, "make_mesh") as made:
        mesh_of(make_plan(tiny(*ranks, "comm.deadline=7", "comm.sms=20")), CPU)
    (given,) = made.call_args_list
    layout, device, timeout, sms = given.args
    # DualPipe has two routes.
    assert (layout, device, sms) == (Layout(pp=2, dp=3, ep=4, routes=2), CPU, 20)
    assert timedelta(seconds=7) <= timeout < timedelta(seconds=60)


def test_a_dispatcher_has_room_for_the_widest_row_and_all_tokens_of_a_microbatch(tiny: Tiny) -> None:
    """FP8 rows are dispatched, BF16 rows combined: 32 numbers and two FP32 weights."""
    config = tiny("run.dtype=bf16", "fp8.preset=deepseek_v3", "parallel.microbatch_sequences=2", "comm.chunks=3")
    with mock.patch.object(rig, "make_dispatcher", wraps=rig.make_dispatcher) as made:
        rig_of(config.model_copy(update={"comm": config.comm.model_copy(update={"imbalance": 1.5})}))
    name, setup, imbalance = made.call_args.args
    assert (name, imbalance) == ("auto", 1.5)
    assert isinstance(setup, Setup)
    assert (setup.experts, setup.top_k, setup.chunks) == (4, 2, 3)
    assert (setup.tokens, setup.row_bytes) == (2 * 32, 32 * 2 + 2 * 4)


@pytest.mark.parametrize(("overlap", "order"), [("on", ORDERS["cpu"]), ("off", None)])
def test_pairs_are_woven_if_overlap_is_on(tiny: Tiny, overlap: str, order: object) -> None:
    ours = rig_of(tiny(f"parallel.overlap={overlap}"))
    assert ours.training(16).order is order
    assert ours.training(16) is ours.training(16)
    assert ours.validation.order is order
