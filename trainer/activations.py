"""How much memory the microbatches in flight of a run take, rank by rank, before anything is built. Torch-free.

The schedule says which flights a rank holds at once, `model/memory.py` what each of them keeps.
"""

from __future__ import annotations

from collections.abc import Mapping

from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.schedule.table import build
from dryvine.trainer.config import Config, split
from dryvine.trainer.model.memory import MicrobatchSize, saved_bytes

DTYPE_BYTES = {"fp32": 4, "bf16": 2}


def microbatch_size(config: Config, cuda: bool) -> MicrobatchSize:
    """A microbatch of the run on each rank, its rows spread evenly over the experts."""
    sequences = config.parallel.microbatch_sequences
    tokens = sequences * config.data.seq_len
    single_rank = config.parallel.ep == 1 and config.comm.dispatcher in ("auto", "flat")
    return MicrobatchSize(tokens, sequences, DTYPE_BYTES[config.run.dtype], cuda, single_rank)


def stage_bytes(config: Config, cuda: bool) -> dict[int, int]:
    """What a flight keeps in each stage."""
    size = microbatch_size(config, cuda)
    return {stage: saved_bytes(config.model, config.fp8, names, size) for stage, names in enumerate(split(config))}


def most_held(schedule: Schedule, rank: int, sizes: Mapping[int, int]) -> int:
    """Bytes of all flights that the rank holds at once: from the start of F to the end of B or W. A pair holds both."""
    now = most = 0
    for slot in schedule.ranks[rank]:
        now += sum(sizes[op.stage] for op in slot if op.kind == "F")
        most = max(most, now)
        now -= sum(sizes[op.stage] for op in slot if op.kind in "BW")
    return most


def activations(config: Config, cuda: bool) -> str:
    """A line for the start of a run: the most that microbatches in flight keep, and where."""
    p, sizes = config.parallel, stage_bytes(config, cuda)
    schedule = build(p.schedule, p.pp, config.microbatches(config.batch.sequences), p.chunks)
    held = [most_held(schedule, rank, sizes) for rank in range(p.pp)]
    rank = held.index(max(held))
    return f"activations kept for backwards: at most {held[rank] / 1e9:.3g} GB, on pipeline rank {rank} of {p.pp}"
