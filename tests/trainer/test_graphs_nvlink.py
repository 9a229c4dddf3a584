"""Ops with messages, replayed: recordings as a CPU plays them (`support.tape`), with `nvlink`'s messages between their
parts. Files stand in for GPUs' memory and threads for copy engines (`support.host_links`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from dryvine.comm import local
from dryvine.comm.dispatch import nvlink, payload, token_plan
from dryvine.comm.dispatch.nvlink import Nvlink
from dryvine.comm.dispatch.token_plan import RowRoom
from dryvine.parallel.graphs import Graphs
from dryvine.trainer.config import Config
from dryvine.trainer.model import documents, grouped, swiglu
from dryvine.trainer.ramps import points
from dryvine.trainer.rig import Rig
from dryvine.trainer.step import evaluate, train_step
from dryvine.trainer.tensors import in_order
from tests.support.documents import short_documents
from tests.support.host_links import open_host_links
from tests.support.masked_experts import add_masked_product, masked_product, masked_swiglu
from tests.support.recorded import attend_as_on_a_gpu
from tests.support.rig import rig_of
from tests.support.tape import TapeRecorder

Tiny = Callable[..., Config]
LAYOUTS = [
    (1, 2, "dualpipev"), (2, 2, "dualpipe"), (1, 4, "dualpipev"),
    *(pytest.param(1, 2, name, marks=pytest.mark.long) for name in ("one_f_one_b", "zb1p")),
]  # fmt: skip


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """`payload.gather` without a size that depends on how many rows there are."""
    picked = rows.index_select(0, index.clamp(min=0))
    return torch.where((index < 0).view(-1, *[1] * (rows.dim() - 1)), 0, picked)


@contextmanager
def _as_on_a_gpu(folder: Path, room: float) -> Iterator[None]:
    """Memory that ranks share, sorted sums, and experts whose rows the host does not count, recorded or not. `room`
    times the mean of rows where they are not."""
    without = partial(token_plan.unread, room=RowRoom(room, torch.zeros(1, dtype=torch.int64)))
    with (
        mock.patch.object(nvlink, "open_links", partial(open_host_links, folder)),
        mock.patch.object(nvlink, "gather", _gather),
        mock.patch.object(payload, "gather", _gather),
        mock.patch.object(token_plan, "plan", without),
        mock.patch.object(grouped, "grouped_product", masked_product),
        mock.patch.object(grouped, "add_grouped_product", add_masked_product),
        mock.patch.object(swiglu, "swiglu_forward", masked_swiglu),
        mock.patch.object(in_order, "_sorts", return_value=True),
    ):
        yield


def _recorded(rig: Rig) -> TapeRecorder:
    assert isinstance(rig.dispatcher, Nvlink)
    recorder = TapeRecorder(rig.dispatcher.windows.live)
    rig.graphs = Graphs(recorder, rig.dispatcher.meter, lambda: rig.model.loss_weights.mtp)
    rig.graphs.loaded.add(None)
    rig.overflows = rig.dispatcher.room.overflows
    return recorder


class Trained(NamedTuple):
    steps: list[Any]  # losses, norm and bytes of each
    weights: dict[str, Any]
    replays: int
    overflows: list[int | None]  # of each step


def trained(rank: int, folder: Path, config: Config, graphs: bool, room: float) -> Trained:
    """`room`: for rows of ops that are not recorded."""
    with _as_on_a_gpu(folder, room):
        rig, seen, overflows = rig_of(config), [], []
        recorder = _recorded(rig) if graphs else None
        for point in islice(points(rig.config.batch, rig.config.data.seq_len), 2):
            outcome = train_step(rig, point)
            losses = {name: [float(loss) for loss in many] for name, many in outcome.played.losses.items()}
            seen.append([losses, outcome.norm, rig.dispatcher.meter.take()])
            overflows.append(outcome.overflows)
            assert outcome.played.exposed > 0, "the waits for messages are not measured"
        rig.optimizer.zero.settle()
        weights = {name: w.detach().numpy().copy() for name, w in rig.model.named_parameters()}
        return Trained(seen, weights, recorder.replayed if recorder else 0, overflows)


@pytest.mark.parametrize(("pp", "ep", "schedule"), LAYOUTS)
def test_replayed_ops_with_messages_have_the_same_bits(
    tiny: Tiny, tmp_path: Path, pp: int, ep: int, schedule: str
) -> None:
    """Pairs too, whose ops take turns. With more than two ranks rows have less room than all would need."""
    layout = (f"parallel.pp={pp}", f"parallel.ep={ep}", f"parallel.schedule={schedule}", "parallel.graph_room=3")
    config = tiny(*layout, "comm.dispatcher=nvlink", "model.layers=4", "batch.sequences=8")
    room = config.parallel.recorded_room
    plain, replayed = (local.run(trained, ep * pp, tmp_path, config, graphs, room) for graphs in (False, True))
    for one, again in zip(plain, replayed, strict=True):
        assert again.steps == one.steps
        assert one.replays == 0
        assert again.replays > 0
        assert again.overflows == [0, 0]
        _same(one.weights, again.weights)


def test_a_step_without_room_for_its_rows_is_run_again_without_graphs(tiny: Tiny, tmp_path: Path) -> None:
    """A mean's room is too little for one of two ranks at least, whatever the routing is: in every step."""
    layout = ("parallel.ep=2", "parallel.schedule=dualpipev", "parallel.graph_room=1", "comm.dispatcher=nvlink")
    config = tiny(*layout, "model.layers=4", "batch.sequences=8")
    plain, replayed = (local.run(trained, 2, tmp_path, config, graphs, 2.0) for graphs in (False, True))
    for one, again in zip(plain, replayed, strict=True):
        assert again.replays > 0
        assert all(again.overflows)
        # What was sent in vain counts too.
        assert [step[:2] for step in again.steps] == [step[:2] for step in one.steps]
        _same(one.weights, again.weights)


def masked(rank: int, folder: Path, config: Config, graphs: bool) -> tuple[list[Any], list[int]]:
    """Losses and norm of each step over documents, with validations between; and how often the rank had recorded
    anew by then."""
    with _as_on_a_gpu(folder, 2.0), pytest.MonkeyPatch.context() as patch:
        attend_as_on_a_gpu(patch)
        # So that a microbatch of one document more has no room.
        patch.setattr(documents, "_FEWEST", 1)
        patch.setattr(documents, "power_of_two", lambda number: number)
        rig, seen, recorded = rig_of(config), [], []
        recorder = _recorded(rig) if graphs else TapeRecorder()
        for point in islice(points(rig.config.batch, rig.config.data.seq_len), 4):
            outcome = train_step(rig, point)
            losses = {name: [float(loss) for loss in many] for name, many in outcome.played.losses.items()}
            seen.append((losses, outcome.norm, evaluate(rig).loss))
            recorded.append(recorder.freed)
        rig.optimizer.zero.settle()
        return seen, recorded


def test_documents_of_ranks_outgrow_their_graphs_at_different_times(tiny: Tiny, tmp_path: Path) -> None:
    """A rank records while the others replay, and they mean the same slots, whatever each has sent before."""
    source = f'data.source="{short_documents(tmp_path / "short")}"'
    layout = ("parallel.ep=2", "parallel.schedule=dualpipev", "parallel.microbatch_sequences=2")
    words = ("comm.dispatcher=nvlink", "data.mask=document", "model.layers=3", "batch.sequences=8")
    config = tiny(source, *layout, *words, "run.eval_batches=1")
    plain, replayed = (local.run(masked, 2, tmp_path, config, graphs, deadline=60) for graphs in (False, True))
    assert [seen for seen, _ in replayed] == [seen for seen, _ in plain]
    one, other = (recorded for _, recorded in replayed)
    assert one != other


def names_of_messages(rank: int, folder: Path, config: Config) -> tuple[list[str], list[str]]:
    """What the deadline would call them: in a step of graphs, and in a validation after it."""
    with _as_on_a_gpu(folder, 2.0):
        rig, names = rig_of(config), list[str]()
        _recorded(rig)
        assert isinstance(rig.dispatcher, Nvlink)
        expect = rig.dispatcher.windows.expect

        def noting(what: str, *of: Any) -> None:
            names.append(what)
            expect(what, *of)

        rig.dispatcher.windows.expect = noting
        train_step(rig, next(iter(points(rig.config.batch, rig.config.data.seq_len))))
        count = len(names)
        evaluate(rig)
        return names[:count], names[count:]


def test_a_message_after_a_replay_is_not_named_by_its_op(tiny: Tiny, tmp_path: Path) -> None:
    layout = ("parallel.ep=2", "parallel.schedule=dualpipev", "comm.dispatcher=nvlink")
    config = tiny(*layout, "model.layers=3", "batch.sequences=8", "run.eval_batches=1")
    for replayed, after in local.run(names_of_messages, 2, tmp_path, config, deadline=60):
        assert all(" of stage " in name for name in replayed)
        assert after
        assert not any(" of stage " in name for name in after)


def _same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in one.items():
        assert (value == other[name]).all(), name
