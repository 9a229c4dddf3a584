"""The `[comm]` table. Imports no torch: a config is checked where there is none."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field

from dryvine.comm.dispatch.backends import check_name
from dryvine.comm.topology import TopologyConfig


class CommConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """How tokens reach their experts. `dispatcher` is auto, or a name in `comm.dispatch.backends.BACKENDS`."""

    dispatcher: Annotated[str, AfterValidator(check_name)] = "auto"
    chunks: int = Field(default=4, ge=1, description="parts in which tokens cross nodes, so that both hops run at once")
    deadline: float = Field(
        default=600.0, gt=0, le=1e6, description="seconds until a wait for other ranks fails the run"
    )
    imbalance: float = Field(
        default=0.0, ge=0, description="dispatch in rounds beyond this times the mean load; 0: never"
    )
    sums: Literal["by_rank", "by_choice"] = Field(
        default="by_rank",
        description="how nvlink adds a token's rows; by_choice has flat's bits and returns top_k times the bytes",
    )
    sms: int | None = Field(
        default=None, ge=1, description="a GPU's SMs for the expert all-to-all, left free by GEMMs; none: NCCL's choice"
    )
    topology: TopologyConfig = TopologyConfig()
