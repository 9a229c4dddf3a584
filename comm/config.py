"""The `[comm]` table."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class CommConfig(BaseModel, frozen=True, extra="forbid"):
    """`dispatcher` is a name in `comm.table.DISPATCHERS`."""

    dispatcher: Literal["flat", "hierarchical"] = "flat"
