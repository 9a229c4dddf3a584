"""The `[comm]` table."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from dryvine.comm.topology import TopologyConfig


class CommConfig(BaseModel, frozen=True, extra="forbid"):
    """How tokens reach their experts. `dispatcher` is a name in `comm.dispatch.backends.DISPATCHERS` (written
    out here, so that a config is checked without torch), or auto."""

    dispatcher: Literal["auto", "flat", "hierarchical", "deepep", "mpi", "fake"] = "auto"
    chunks: int = Field(default=4, ge=1, description="parts in which tokens cross nodes, so that both hops run at once")
    deadline: float = Field(default=600.0, gt=0, description="seconds until a wait for other ranks fails the run")
    imbalance: float = Field(
        default=0.0, ge=0, description="dispatch in rounds beyond this times the mean load; 0: never"
    )
    sms: int | None = Field(
        default=None, ge=1, description="a GPU's SMs for the expert all-to-all, left free by GEMMs; none: NCCL's choice"
    )
    topology: TopologyConfig = TopologyConfig()
