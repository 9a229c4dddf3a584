"""The `[comm]` table."""

from __future__ import annotations

from pydantic import BaseModel


class CommConfig(BaseModel, frozen=True, extra="forbid"):
    """`dispatcher` is a name in `comm.table.DISPATCHERS`."""

    dispatcher: str = "flat"
