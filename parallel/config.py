"""How a run is spread over ranks: the `[parallel]` table."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

Positive = Annotated[int, Field(ge=1)]


class ParallelConfig(BaseModel, frozen=True, extra="forbid"):
    """Ranks are pp x dp x ep; expert-parallel ranks are data-parallel for everything but the routed experts."""

    pp: Positive = 1
    dp: Positive = 1
    ep: Positive = 1
    schedule: str = "one_f_one_b"  # a name in SCHEDULES, or file:PATH.csv
    chunks: Positive = 1  # stages per rank, for schedules that take a choice
    microbatch_sequences: Positive = 1
    overlap: Literal["on", "off"] = "on"
    graphs: Literal["auto", "on", "off"] = "auto"  # replay ops as CUDA graphs; auto: where a run can
    graph_room: float = Field(
        default=2.0,
        ge=1,
        description="experts' rows that graphs have room for, over the mean of expert-parallel ranks",
    )

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.ep

    @property
    def recorded_room(self) -> float:
        """`graph_room`, but no more than all rows of a group, which is so many times the mean."""
        return min(self.graph_room, self.ep)
