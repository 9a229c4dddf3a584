"""CUDA's streams without CUDA: ops run at once on the CPU, and what their streams would have allowed is worked out.

A stream is a name here, with a vector clock of what it has waited for. Every op counts one on its own stream; an event
is a copy of a clock, and waiting takes the later of both. So three faults show that a GPU shows only sometimes:

    unordered read   of what another stream has written, without having waited for it
    unordered write  over what another stream reads or has written, likewise
    early free       of memory that another stream may still use: its own stream has run an op since without waiting,
                     and an op is where the caching allocator hands memory out again

`torch.cuda._sanitizer` finds the first two, on a GPU, and not the third, which is the caching allocator's.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dryvine.parallel.streams import CudaStreams, SideStreams

Clock = Counter[str]  # stream -> how many of its ops are over


@dataclass
class Stream:
    """What `CudaStreams` asks of a `torch.cuda.Stream`."""

    name: str
    clock: Clock = field(default_factory=Counter)

    def record_event(self) -> Clock:
        return Counter(self.clock)

    def wait_event(self, event: Clock) -> None:
        self.clock |= event

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.clock)


@dataclass
class Memory:
    """One storage: who made it, wrote it last, and read it since."""

    alive: StorageWeakRef
    stream: str
    made_by: str
    written: tuple[str, int]
    read: dict[str, int] = field(default_factory=dict)  # since
    guests: dict[str, int] = field(default_factory=dict)  # other streams, and when they last used it


class Races(TorchDispatchMode):
    """Watches every op while it is on. `found` counts the faults, in words."""

    def __init__(self) -> None:
        super().__init__()
        self.streams = {name: Stream(name) for name in ("compute", "comm", "wgrad")}
        self.here = self.streams["compute"]
        self.memory: dict[int, Memory] = {}
        self.shared: dict[str, dict[int, Memory]] = {name: {} for name in self.streams}  # by owner: used by others too
        self.found: Counter[str] = Counter()

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Stands for `torch.cuda.stream`."""
        before, self.here = self.here, stream
        try:
            yield
        finally:
            self.here = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._reuse(str(func))
        out = func(*args, **kwargs)
        self.here.clock[self.here.name] += 1
        written = _written(func, args, kwargs)
        for tensor in _tensors((args, kwargs)):
            self._use(tensor, str(func), id(tensor) in written)
        for tensor in _tensors(out):
            if StorageWeakRef(tensor.untyped_storage()).cdata not in self.memory:
                self._make(tensor, str(func))
        return out

    def _make(self, tensor: Tensor, op: str) -> None:
        alive, name = StorageWeakRef(tensor.untyped_storage()), self.here.name
        made_by = f"{op} {tuple(tensor.shape)}"
        self.memory[alive.cdata] = Memory(alive, name, made_by, (name, self.here.clock[name]))

    def _use(self, tensor: Tensor, op: str, write: bool) -> None:
        memory = self.memory.get(StorageWeakRef(tensor.untyped_storage()).cdata)
        if memory is None or memory.alive.expired():
            return  # made before the watch began, by an op long over
        clock, name = self.here.clock, self.here.name
        writer, when = memory.written
        if clock[writer] < when:
            self.found[f"{op} in {name} does not wait for {writer}, which wrote what {memory.made_by} made"] += 1
        if write:
            for reader, when in memory.read.items():
                if clock[reader] < when:
                    self.found[
                        f"{op} in {name} writes over what {reader} may still read, made by {memory.made_by}"
                    ] += 1
            memory.written, memory.read = (name, clock[name]), {}
        memory.read[name] = clock[name]
        if name != memory.stream:
            memory.guests[name] = clock[name]
            self.shared[memory.stream][memory.alive.cdata] = memory

    def _reuse(self, op: str) -> None:
        """An op here may be given any memory of this stream's that has been let go."""
        name, clock = self.here.name, self.here.clock
        shared = self.shared[name]
        for key in [key for key, memory in shared.items() if memory.alive.expired()]:
            memory = shared.pop(key)
            for guest, when in memory.guests.items():
                if clock[guest] < when:
                    self.found[f"{op} in {name} may be given what {guest} may still use, made by {memory.made_by}"] += 1


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes())


def _written(func: Any, args: Any, kwargs: Any) -> set[int]:
    """ids of the arguments that an op writes."""
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    marks = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    return {id(t) for name, value in named.items() if name in marks for t in tree_leaves(value)}


class WatchedStreams(CudaStreams):
    """`CudaStreams` over named streams."""

    def __init__(self, races: Races) -> None:
        self.races, self.compute = races, races.streams["compute"]  # type: ignore[assignment]
        self.side = SideStreams(races.streams["comm"], races.streams["wgrad"])  # type: ignore[arg-type]
        self.held: list[Any] = []
        self.dealt = deque()
        self.waits, self.fills, self.noted = [], [], []

    def mark(self) -> None:
        self.noted.append(time.perf_counter())  # type: ignore[arg-type]

    def marks(self) -> list[Any]:
        return self.noted

    def exposed(self) -> float:
        return 0.0
