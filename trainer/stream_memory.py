"""Memory that ops need beside their flights on streams that hold what they have read. Torch-free.

`parallel.streams.CudaStreams` holds what a compute step has read until STEPS_HELD more have run. In a backward those
are the gradients that phases hand on and the operands of weight gradients, which are a third of a layer's activations,
and all of a layer that was recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dryvine.parallel.flow_control import STEPS_HELD
from dryvine.parallel.schedule.ir import Kind
from dryvine.trainer.activations import FlightSizes, microbatch_size
from dryvine.trainer.model.memory import MicrobatchSize, deferred_bytes, passed_bytes, saved_bytes
from dryvine.trainer.model.shape import blocks
from dryvine.trainer.run_plan import LayoutPlan
from dryvine.trainer.temporaries import block_bytes

STEPS = {"moe": 2, "mtp": 3}  # compute steps of a block; of other kinds 1
Running = dict[tuple[Kind, int], int]  # (kind of op, stage) -> bytes


class BlockNeed(NamedTuple):
    """Of one block in an op."""

    held: int  # by streams, once it has run
    own: int  # its temporaries, while it runs
    freed: int  # of the flight
    steps: int


def running_bytes(plan: LayoutPlan, cuda: bool) -> Running:
    """Bytes that an op of a stage needs at its peak beside what flights keep: what its phases hand on, temporaries, and
    of a B what an I leaves. Empty where a phase's tensors are freed as it ends."""
    if not cuda or plan.config.parallel.overlap == "off":
        return {}
    size, kinds = microbatch_size(plan.config, cuda), {block.name: block.kind for block in blocks(plan.config.model)}
    return {
        (kind, stage): most_at_once([_held(plan, kind, name, kinds[name], size) for name in ordered])
        for stage, names in enumerate(plan.blocks)
        for kind, ordered in _orders(names)
    }


def _orders(names: Sequence[str]) -> tuple[tuple[Kind, Sequence[str]], ...]:
    return ("F", names), ("I", names[::-1]), ("B", names[::-1])


def _held(plan: LayoutPlan, kind: Kind, name: str, block: str, size: MicrobatchSize) -> BlockNeed:
    shape, recipe = plan.config.model, plan.config.fp8
    passed, steps = passed_bytes(shape, recipe, [name], size), STEPS.get(block, 1)
    if kind == "F":
        return BlockNeed(passed.forward, 0, 0, steps)
    own = block_bytes(shape, recipe, block, size)
    if kind == "I":
        return BlockNeed(passed.backward, own, 0, steps)
    left, kept = (count(shape, recipe, [name], size) for count in (deferred_bytes, saved_bytes))
    return BlockNeed(passed.backward + left, own, kept, steps)


def most_at_once(run: Sequence[BlockNeed]) -> int:
    """The most that blocks need, run one after the other: each its own, what the blocks of the last compute steps hold,
    less what those before have freed."""
    most = 0
    for end, block in enumerate(run):
        start = end
        while start and sum(one.steps for one in run[start : end + 1]) < STEPS_HELD + 1:
            start -= 1
        before = sum(one.held for one in run[start:end]) - sum(one.freed for one in run[:start])
        most = max(most, before + max(block.held, block.own))
    return most


def most_running(plan: LayoutPlan, sizes: FlightSizes, running: Running) -> list[int]:
    """The most that each pipeline rank holds of microbatches in flight and for the ops that run."""
    return [plan.footprint.most_held(rank, *sizes, running) for rank in range(plan.config.parallel.pp)]
