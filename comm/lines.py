"""How messages of a pipeline are addressed: channels and lines. Imports no torch: a plan counts them."""

from __future__ import annotations

from typing import NamedTuple

Channel = tuple[int, str]  # (route, "down" | "up")


class Line(NamedTuple):
    """What leaves a pipeline rank on one channel for another arrives there in the same order."""

    source: int
    target: int
    channel: Channel
