"""The dispatchers by name. A new one is a file and a line here, and the tests then run it against `flat`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from dryvine.comm.api import Dispatcher
from dryvine.comm.flat import Flat

DISPATCHERS: dict[str, Callable[..., Dispatcher]] = {"flat": Flat}


def make_dispatcher(name: str, group: dist.ProcessGroup | None, experts: int, topology: Any = None) -> Dispatcher:
    """The dispatcher of an expert-parallel group whose ranks hold `experts` in equal, contiguous shares."""
    if name not in DISPATCHERS:
        raise ValueError(f"comm.dispatcher = {name!r}: no such dispatcher; choose one of {', '.join(DISPATCHERS)}")
    return DISPATCHERS[name](group, experts)
