"""What a rank really holds and sends: bytes of its state by kind, of live tensors at their peak, and on every link."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.autograd.profiler import profile

from dryvine.comm.topology import by_sizes
from dryvine.trainer.config import Config
from dryvine.trainer.data.splits import open_data
from dryvine.trainer.model.gate import Choice, Gate
from dryvine.trainer.ramps import points
from dryvine.trainer.rig import Rig, make_rig, mesh_of
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.step import train_step


class RankBytes(NamedTuple):
    """Of one rank of a run."""

    state: dict[str, int]  # by kind, as in `launch.plan.memory`
    host: dict[str, int]  # the same in host memory, with optim.offload
    peak: int  # the most that torch's allocator had given out at once, in any thread and inside any operator
    sent: dict[str, int]  # by link class, in the last step


def measure(rank: int, config: Config) -> RankBytes:
    """For `local.run`: train a step with even routing, as plans suppose it, and count."""
    plan = make_plan(config)
    with profile(profile_memory=True) as profiled:
        nodes = config.comm.topology.nodes
        mesh = mesh_of(plan, torch.device("cpu"))
        rig = make_rig(plan, mesh, open_data(config), by_sizes(nodes) if nodes else None)
        for gate in rig.model.gates.values():
            gate.choose = evenly(gate)  # type: ignore[method-assign]
        train_step(rig, next(points(config.batch, config.data.seq_len)))
        rig.optimizer.zero.settle()
    results = profiled.kineto_results
    assert results is not None
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    changes = (event.nbytes() for event in events)
    return RankBytes(state(rig), host_state(rig), max(accumulate(changes)), rig.dispatcher.meter.take())


def evenly(gate: Gate) -> Callable[[torch.Tensor, int, bool], Choice]:
    """The gate's choice with other experts: each as often as any other, those of a token neighbours."""
    choose = gate.choose

    def chosen(logits_NE: torch.Tensor, sequences: int, count: bool) -> Choice:
        weights, experts, loss = choose(logits_NE, sequences, count)
        numbers = torch.arange(experts.numel(), device=experts.device)
        return weights, numbers.view_as(experts) % gate.shape.routed, loss

    return chosen


def state(rig: Rig) -> dict[str, int]:
    buckets = rig.optimizer.zero.buckets
    return {
        "weights": sum(b.values.nbytes for b in buckets),
        "gradient sums": sum(b.grads.nbytes for b in buckets),
        "summed gradient shards": sum(b.grad_shard.nbytes for b in buckets if b.grad_shard is not b.grads),
    } | ({} if buckets[0].host else _optimizer(rig))


def host_state(rig: Rig) -> dict[str, int]:
    buckets = rig.optimizer.zero.buckets
    if not buckets[0].host:
        return {}
    return _optimizer(rig) | {"summed gradient shards": sum(b.grad.nbytes for b in buckets)}


def _optimizer(rig: Rig) -> dict[str, int]:
    return {
        "FP32 masters": sum(b.master.nbytes for b in rig.optimizer.zero.buckets),
        "AdamW moments": sum(m.exp_avg.nbytes + m.exp_avg_sq.nbytes for m in rig.optimizer.moments),
    }
