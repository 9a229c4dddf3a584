"""Activation memory of the microbatches in flight, per pipeline rank, computed before anything is built. Torch-free.

The schedule determines which microbatches a rank holds at once, `model/memory.py` what each of them keeps.
"""

from __future__ import annotations

from typing import NamedTuple

from dryvine.parallel.schedule.ir import Kind
from dryvine.trainer.config import Config
from dryvine.trainer.model.memory import MicrobatchSize, deferred_bytes, passed_bytes, saved_bytes
from dryvine.trainer.run_plan import LayoutPlan

DTYPE_BYTES = {"fp32": 4, "bf16": 2}


def microbatch_size(config: Config, cuda: bool, room: float = 1.0) -> MicrobatchSize:
    """The size of a microbatch on each rank, with rows spread evenly over the experts, and room for `room` times as
    many."""
    sequences = config.parallel.microbatch_sequences
    tokens = sequences * config.data.seq_len
    single_rank = config.parallel.ep == 1 and config.comm.dispatcher in ("auto", "flat")
    documents = config.data.mask == "document"
    return MicrobatchSize(tokens, sequences, DTYPE_BYTES[config.run.dtype], cuda, documents, single_rank, room)


def stage_bytes(plan: LayoutPlan, cuda: bool, room: float = 1.0) -> dict[int, int]:
    """Bytes that a microbatch keeps in each stage, from the start of its F to the end of its B or W."""
    config, size = plan.config, microbatch_size(plan.config, cuda, room)
    return {stage: saved_bytes(config.model, config.fp8, names, size) for stage, names in enumerate(plan.blocks)}


def left_bytes(plan: LayoutPlan, cuda: bool, room: float = 1.0) -> dict[int, int]:
    """Bytes that a microbatch keeps in each stage from its I to its W, beside those of `stage_bytes`."""
    config, size = plan.config, microbatch_size(plan.config, cuda, room)
    return {stage: deferred_bytes(config.model, config.fp8, names, size) for stage, names in enumerate(plan.blocks)}


def running_bytes(plan: LayoutPlan, cuda: bool) -> dict[tuple[Kind, int], int]:
    """Bytes that an op keeps in each stage while its slot runs, beside its flight, on streams that hold what they have
    read until the slot ends (`parallel.streams.CudaStreams`): what its phases passed on, and of a B what an I leaves.
    """
    config, size = plan.config, microbatch_size(plan.config, cuda)
    found: dict[tuple[Kind, int], int] = {}
    for stage, names in enumerate(plan.blocks):
        forward, backward = passed_bytes(config.model, config.fp8, names, size)
        left = deferred_bytes(config.model, config.fp8, names, size)
        found |= {("F", stage): forward, ("I", stage): backward, ("B", stage): backward + left}
    return found


class FlightSizes(NamedTuple):
    """What one microbatch keeps in each stage."""

    kept: dict[int, int]  # `stage_bytes`
    left: dict[int, int]  # `left_bytes`
    running: dict[tuple[Kind, int], int]  # `running_bytes`; empty where a step's tensors are freed as it ends


def flight_sizes(plan: LayoutPlan, cuda: bool, room: float = 1.0) -> FlightSizes:
    """They follow from the blocks of each stage and the microbatch, whatever the schedule."""
    holds = cuda and plan.config.parallel.overlap == "on"
    running = running_bytes(plan, cuda) if holds else {}
    return FlightSizes(stage_bytes(plan, cuda, room), left_bytes(plan, cuda, room), running)


def most_held(plan: LayoutPlan, sizes: FlightSizes) -> list[int]:
    """The most that microbatches in flight of these sizes keep at once on each pipeline rank."""
    return [plan.footprint.most_held(rank, sizes.kept, sizes.left) for rank in range(plan.config.parallel.pp)]


def most_in_slots(plan: LayoutPlan, sizes: FlightSizes) -> list[int]:
    """The same with what is held until a slot ends."""
    return [plan.footprint.most_held(rank, *sizes) for rank in range(plan.config.parallel.pp)]


def held_bytes(plan: LayoutPlan, cuda: bool) -> list[int]:
    """Peak bytes that microbatches in flight keep at once, for each pipeline rank."""
    return most_held(plan, flight_sizes(plan, cuda))


def activations(plan: LayoutPlan, cuda: bool) -> str:
    """A line for the start of a run: peak bytes kept for backwards, and on which pipeline rank."""
    held = held_bytes(plan, cuda)
    rank = held.index(max(held))
    return f"activations kept for backwards: at most {held[rank] / 1e9:.3g} GB, on pipeline rank {rank} of {len(held)}"
