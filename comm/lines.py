"""Addresses of pipeline messages: channels and lines. Imports no torch, since plans count them."""

from __future__ import annotations

from typing import NamedTuple

Channel = tuple[int, str]  # (route, "down" | "up")


class Line(NamedTuple):
    """One channel from one pipeline rank to another; messages on it arrive in the order in which they were sent."""

    source: int
    target: int
    channel: Channel
