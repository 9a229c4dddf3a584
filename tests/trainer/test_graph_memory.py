"""What graphs are said to hold: the flights that `parallel.graphs` records; bytes only for runs that have graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dryvine.comm.dispatch.meter import Meter
from dryvine.launch.plan.hardware import load_hardware
from dryvine.launch.plan.memory import GRAPHS
from dryvine.launch.plan.plan import make
from dryvine.parallel.graphs import Graphs
from dryvine.parallel.stage import Flight
from dryvine.trainer.activations import flight_sizes, held_bytes, left_bytes, microbatch_size, stage_bytes
from dryvine.trainer.config import Config
from dryvine.trainer.graph_memory import flights, graph_bytes, graph_line, graphs_refusal, may_overflow
from dryvine.trainer.run_plan import RunPlan, make_plan
from dryvine.trainer.stream_memory import most_running, running_bytes
from dryvine.trainer.temporaries import temporary_bytes
from tests.support.tape import TapeRecorder

Tiny = Callable[..., Config]
SCHEDULES = (
    ("parallel.pp=1", "batch.sequences=4"),
    ("parallel.pp=4", "parallel.schedule=one_f_one_b", "batch.sequences=8"),
    ("parallel.pp=4", "parallel.schedule=dualpipe", "batch.sequences=8"),
    ("parallel.pp=2", "parallel.schedule=dualpipev", "batch.sequences=8"),
    ("parallel.pp=2", "parallel.schedule=zb1p", "batch.sequences=8"),
    ("parallel.pp=2", "parallel.schedule=interleaved", "parallel.chunks=2", "batch.sequences=8"),
)


def extra(plan: RunPlan, cuda: bool = True) -> list[int]:
    return graph_bytes(plan, flight_sizes(plan, cuda), held_bytes(plan, cuda), cuda)


def recorded(plan: RunPlan, rank: int) -> dict[int, int]:
    """Flights that `Graphs` has room for after a step, by stage."""
    graphs = Graphs(TapeRecorder(), Meter(), lambda: None)
    flight = Flight(torch.zeros(1, 1), 1.0)
    for _ in range(2):
        graphs.begin(None, [])
        for op in plan.schedule.ops(rank):
            graphs._recordings(op, flight)
            graphs._release(op)
    return {stage: len(graphs._recorded[stage]) for stage in plan.schedule.stages_of(rank)}


@pytest.mark.parametrize("overrides", SCHEDULES, ids=" ".join)
def test_flights_are_those_that_are_recorded(tiny: Tiny, overrides: tuple[str, ...]) -> None:
    plan = make_plan(tiny("run.dtype=bf16", *overrides))
    for rank in range(plan.config.parallel.pp):
        assert flights(plan, rank) == recorded(plan, rank)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("run.dtype=fp32", "in FP32"),
        ('data.mask=document rl.chat.tokenizer="none" rl.max_tokens=16 rl.ahead=true', "two threads"),
        ("parallel.ep=4", "expert-parallel"),
        ("parallel.ep=2 comm.dispatcher=flat", "expert-parallel"),
        ("parallel.ep=2 comm.dispatcher=nvlink comm.imbalance=1.5", "expert-parallel"),
    ],
)
def test_who_has_no_graphs_pays_for_none(tiny: Tiny, override: str, why: str) -> None:
    config = tiny("run.dtype=bf16", "parallel.pp=2", *override.split())
    assert why in (graphs_refusal(config, cuda=True) or "")
    assert extra(make_plan(config)) == [0, 0]


def test_who_may_overflow(tiny: Tiny) -> None:
    """Runs with graphs whose room is less than their ranks; with `auto` only where it may take nvlink."""

    def may(words: str) -> bool:
        return may_overflow(tiny("run.dtype=bf16", *words.split()), cuda=True)

    assert may("parallel.ep=4 comm.dispatcher=nvlink")
    assert may("parallel.ep=2 parallel.graph_room=1.5")
    fine = ("ep=2", "ep=4", "ep=4 comm.dispatcher=nvlink parallel.graph_room=4", "ep=1 parallel.graph_room=1")
    assert not any(may(f"parallel.{words}") for words in (*fine, "ep=2 parallel.graph_room=1 parallel.graphs=off"))
    assert not may_overflow(tiny("run.dtype=bf16", "parallel.ep=4", "comm.dispatcher=nvlink"), cuda=False)


def test_off_and_a_cpu_have_none(tiny: Tiny) -> None:
    plan = make_plan(tiny("run.dtype=bf16"))
    assert extra(plan, cuda=False) == [0]
    assert extra(plan)[0] > 0
    assert extra(make_plan(tiny("run.dtype=bf16", "parallel.graphs=off"))) == [0]


def test_one_flight_costs_what_goes_in_and_out(tiny: Tiny) -> None:
    plan = make_plan(tiny("run.dtype=bf16"))
    tokens = plan.config.parallel.microbatch_sequences * plan.config.data.seq_len
    assert extra(plan) == [4 * tokens * plan.config.model.hidden * 2]


def test_flights_share_nothing(tiny: Tiny) -> None:
    """DualPipe on two ranks: rank 0 has two microbatches in its first stage and one in its last, three in all; at most
    two at once."""
    plan = make_plan(tiny("run.dtype=bf16", "parallel.pp=2", "parallel.schedule=dualpipe", "batch.sequences=8"))
    size, (kept_0, kept_1) = microbatch_size(plan.config, cuda=True), stage_bytes(plan, cuda=True).values()
    left_0, left_1 = left_bytes(plan, cuda=True).values()
    own_0, own_1 = (temporary_bytes(plan, [stage], cuda=True) for stage in (0, 1))
    counts = flights(plan, 0)
    split = {op.stage for op in plan.schedule.ops(0) if op.kind == "I"}
    state = 4 * size.tokens * plan.config.model.hidden * 2
    hold = sum(
        counts[n] * (kept + own + state + (left if n in split else 0))
        for n, (kept, own, left) in enumerate([(kept_0, own_0, left_0), (kept_1, own_1, left_1)])
    )
    assert sum(counts.values()) == 3
    assert extra(plan)[0] == hold - held_bytes(plan, cuda=True)[0] - max(own_0, own_1)
    row = make(plan, load_hardware("h100")).ranks[0].kinds[GRAPHS]
    assert row == extra(plan)[0]
    running = most_running(plan, flight_sizes(plan, cuda=True), running_bytes(plan, cuda=True))[0]
    least = max(held_bytes(plan, cuda=True)[0] + max(own_0, own_1), running)
    assert f"hold {hold / 1e9:.3g} GB" in graph_line(plan)
    assert f"in 3 flights; ops without hold {least / 1e9:.3g} GB or more" in graph_line(plan)
