"""Activation memory of the microbatches in flight, per pipeline rank, computed before anything is built. Torch-free.

The schedule determines which microbatches a rank holds at once, `model/memory.py` what each of them keeps.
"""

from __future__ import annotations

from typing import NamedTuple

from dryvine.trainer.config import Config
from dryvine.trainer.model.memory import MicrobatchSize, deferred_bytes, saved_bytes
from dryvine.trainer.rl.config import CORE_TOKENS
from dryvine.trainer.run_plan import LayoutPlan

DTYPE_BYTES = {"fp32": 4, "bf16": 2}


def microbatch_size(config: Config, cuda: bool, room: float = 1.0) -> MicrobatchSize:
    """The size of a microbatch on each rank, with rows spread evenly over the experts, and room for `room` times as
    many."""
    sequences = config.parallel.microbatch_sequences
    tokens = sequences * config.data.seq_len
    single_rank = config.parallel.ep == 1 and config.comm.dispatcher in ("auto", "flat")
    documents = config.data.mask == "document"
    core = CORE_TOKENS if config.rl else 1
    wide, ep = DTYPE_BYTES[config.run.dtype], config.parallel.ep
    return MicrobatchSize(tokens, sequences, wide, cuda, documents, single_rank, room, core, ep)


def stage_bytes(plan: LayoutPlan, cuda: bool, room: float = 1.0) -> dict[int, int]:
    """Bytes that a microbatch keeps in each stage, from the start of its F to the end of its B or W."""
    config, size = plan.config, microbatch_size(plan.config, cuda, room)
    return {stage: saved_bytes(config.model, config.fp8, names, size) for stage, names in enumerate(plan.blocks)}


def left_bytes(plan: LayoutPlan, cuda: bool, room: float = 1.0) -> dict[int, int]:
    """Bytes that a microbatch keeps in each stage from its I to its W, beside those of `stage_bytes`; 0 where it keeps
    less than those."""
    config, size = plan.config, microbatch_size(plan.config, cuda, room)
    return {
        stage: max(0, deferred_bytes(config.model, config.fp8, names, size)) for stage, names in enumerate(plan.blocks)
    }


class FlightSizes(NamedTuple):
    """What one microbatch keeps in each stage."""

    kept: dict[int, int]  # `stage_bytes`
    left: dict[int, int]  # `left_bytes`


def flight_sizes(plan: LayoutPlan, cuda: bool, room: float = 1.0) -> FlightSizes:
    """They follow from the blocks of each stage and the microbatch, whatever the schedule."""
    return FlightSizes(stage_bytes(plan, cuda, room), left_bytes(plan, cuda, room))


def most_held(plan: LayoutPlan, sizes: FlightSizes) -> list[int]:
    """The most that microbatches in flight of these sizes keep at once on each pipeline rank."""
    return [plan.footprint.most_held(rank, *sizes) for rank in range(plan.config.parallel.pp)]


def held_bytes(plan: LayoutPlan, cuda: bool) -> list[int]:
    """Peak bytes that microbatches in flight keep at once, for each pipeline rank."""
    return most_held(plan, flight_sizes(plan, cuda))


def activations(plan: LayoutPlan, cuda: bool) -> str:
    """A line for the start of a run: peak bytes kept for backwards, and on which pipeline rank."""
    held = held_bytes(plan, cuda)
    rank = held.index(max(held))
    return f"activations kept for backwards: at most {held[rank] / 1e9:.3g} GB, on pipeline rank {rank} of {len(held)}"
