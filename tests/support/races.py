"""CUDA's streams and NCCL's messages without a GPU: ops run at once on the CPU, and what their streams would have
allowed is worked out.

A stream is a name here, with a vector clock of what it has waited for. Every op counts one on its own stream; an event
is a copy of a clock, and waiting takes the later of both. So three faults show that a GPU shows only sometimes:

    unordered read   of what another stream has written, without having waited for it
    unordered write  over what another stream reads or has written, likewise
    early free       of memory that another stream may still use: its own stream has run an op since without waiting,
                     and an op is where the caching allocator hands memory out again

Messages are modelled on torch's ProcessGroupNCCL. Each communicator has a stream of its own for each peer. `isend` and
`irecv` make it wait for the stream that posts them; there it reads what is sent, and writes what arrives. `Work.wait`
makes the stream that calls it wait, not the host. `is_completed` tells the host that a message is over, so that
whatever is queued from then on comes after it; here a coin decides whether it is.

Messages by copy engine (`CopyWire`) are modelled too: a peer writes a slot when the event of the credit for it lets it.

`torch.cuda._sanitizer` finds the first two faults, on a GPU, and not the third, which is the caching allocator's.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dryvine.comm.copy_wire import Ring
from dryvine.comm.lines import Line
from dryvine.comm.pending import Pending
from dryvine.parallel import streams
from dryvine.parallel.overlap import ORDERS

Clock = Counter[str]  # stream -> how many of its ops are over


class Event:
    """What is asked of a `torch.cuda.Event`."""

    def __init__(self, races: Races) -> None:
        self.races, self.clock = races, Clock()

    def record(self, stream: Stream) -> None:
        self.clock = Counter(stream.clock)

    def synchronize(self) -> None:
        self.races.host_waits(self.clock)

    def elapsed_time(self, other: Event) -> float:
        return 0.0


@dataclass
class Stream:
    """What is asked of a `torch.cuda.Stream`."""

    races: Races
    name: str
    clock: Clock

    def record_event(self) -> Event:
        event = Event(self.races)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.clock |= event.clock

    def wait_stream(self, other: Stream) -> None:
        self.clock |= other.clock


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
        self.streams: dict[str, Stream] = {}
        self.past = Clock()  # what the host knows to be over
        self.here = self.stream("compute")
        self.memory: dict[int, Memory] = {}
        self.shared: defaultdict[str, dict[int, Memory]] = defaultdict(dict)  # by owner: what others use too
        self.found: Counter[str] = Counter()

    def stream(self, name: str) -> Stream:
        return self.streams.setdefault(name, Stream(self, name, Counter(self.past)))

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Stands for `torch.cuda.stream`."""
        before, self.here = self.here, stream
        try:
            yield
        finally:
            self.here = before

    def host_waits(self, clock: Clock) -> None:
        """Whatever is queued from now on comes after what the host has waited for."""
        self.past |= clock
        for stream in self.streams.values():
            stream.clock |= clock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)  # touches no memory
        self._reuse(str(func))
        out = func(*args, **kwargs)
        written = _written(func, args, kwargs)
        self.here.clock[self.here.name] += 1
        for tensor in _tensors((args, kwargs)):
            self.use(tensor, str(func), id(tensor) in written)
        for tensor in _tensors(out):
            if StorageWeakRef(tensor.untyped_storage()).cdata not in self.memory:
                self._make(tensor, str(func))
        return out

    def _make(self, tensor: Tensor, op: str) -> None:
        alive, name = StorageWeakRef(tensor.untyped_storage()), self.here.name
        made_by = f"{op} {tuple(tensor.shape)}"
        self.memory[alive.cdata] = Memory(alive, name, made_by, (name, self.here.clock[name]))

    def made_before(self, tensor: Tensor, name: str) -> None:
        """Watch memory that was there before the watch began."""
        alive = StorageWeakRef(tensor.untyped_storage())
        self.memory[alive.cdata] = Memory(alive, "compute", name, ("compute", 0))

    def use(self, tensor: Tensor, op: str, write: bool) -> None:
        """The op that this stream has counted last reads or writes `tensor`."""
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


@dataclass
class Work:
    """A message under way, as NCCL's `Work` is."""

    races: Races
    event: Event
    coin: random.Random

    def wait(self) -> bool:
        self.races.here.wait_event(self.event)
        return True

    def is_completed(self) -> bool:
        over = self.coin.random() < 0.5
        if over:
            self.event.synchronize()
        return over


class Nccl:
    """One rank's `torch.distributed`, whose peers are always there and send noise."""

    def __init__(self, races: Races, rank: int) -> None:
        self.races, self.rank = races, rank
        self.coin = random.Random(rank)
        self.groups: dict[str, list[int]] = {}

    def new_group(self, ranks: list[int], *_: Any) -> str:
        name = f"group {len(self.groups)}"
        self.groups[name] = ranks
        return name

    def get_process_group_ranks(self, group: str | None) -> list[int]:
        return [self.rank] if group is None else self.groups[group]

    def get_rank(self) -> int:
        return self.rank

    def isend(self, tensor: Tensor, peer: int, group: str) -> Work:
        with self._beside(f"{group} with {peer}") as work:
            self.races.use(tensor, "isend", write=False)
        return work

    def irecv(self, tensor: Tensor, peer: int, group: str) -> Work:
        with self._beside(f"{group} with {peer}") as work:
            self.races.use(tensor, "irecv", write=True)
            with torch.utils._python_dispatch._disable_current_modes():
                tensor.data.uniform_()  # not seen by autograd, either
        return work

    @contextmanager
    def _beside(self, name: str) -> Iterator[Work]:
        """One kernel of NCCL, in a stream of its own, behind the stream that posts it. Messages have one for each
        communicator and peer, collectives one for each communicator."""
        stream = self.races.stream(name)
        stream.wait_stream(self.races.here)
        work = Work(self.races, Event(self.races), self.coin)
        with self.races.on(stream):
            stream.clock[stream.name] += 1
            yield work
        work.event.record(stream)

    def reduce_scatter(self, out: Tensor, whole: Tensor, group: str, async_op: bool) -> Work:
        with self._beside(group) as work:
            out.copy_(whole[: out.numel()])
        return work

    def all_gather(self, out: Tensor, part: Tensor, group: str, async_op: bool) -> Work:
        with self._beside(group) as work:
            out[: part.numel()].copy_(part)
        return work

    # A collective that is not async runs behind the stream that calls it, which waits for it: it is an op of that one.

    def all_reduce(self, tensor: Tensor, **_: Any) -> None:
        tensor.mul_(1)

    def all_gather_object(self, out: list[Any], value: Any, group: None) -> None:
        out[:] = [value] * len(out)


class HasWrites(Protocol):
    """Links whose queues note when they wrote a word."""

    races: Races
    writes: dict[tuple[int, int], Event]  # (word, value) -> when it was written


L = TypeVar("L", bound=HasWrites)


@dataclass
class StreamQueue(Generic[L]):
    """Copies and writes in a stream; a queue of some links adds its waits."""

    links: L
    stream: Stream

    def after_caller(self) -> None:
        self.stream.wait_stream(self.links.races.here)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with self.links.races.on(self.stream):
            target.copy_(source)

    def write(self, words: Sequence[int], value: int) -> None:
        self.links.writes.update(((word, value), self.stream.record_event()) for word in words)

    def write_at_once(self, words: Sequence[int], value: int) -> None:
        """`write`, as if it did not wait for what was queued before."""
        self.links.writes.update(((word, value), Event(self.links.races)) for word in words)


class Queue(StreamQueue["Neighbours"]):
    """Work in a stream that reaches the memory of peers, for `CopyWire`."""

    def wait(self, words: Sequence[int], value: int) -> None:
        for word in words:
            if (line := self.links.flags.get(word)) and line.target == self.links.rank:
                self.stream.wait_stream(self.links.fill(line, value - 1))

    def here(self) -> Pending[None]:
        work = Work(self.links.races, self.stream.record_event(), self.links.coin)
        return Pending(lambda: work.races.here.wait_event(work.event), work.is_completed)


class Slots:
    """A rank's memory. Each slot is a storage of its own, since slots are what streams race for."""

    def __init__(self, races: Races) -> None:
        self.races = races
        self.slots: dict[int, Tensor] = {}

    def __getitem__(self, place: slice) -> Tensor:
        if place.start not in self.slots:
            with torch.utils._python_dispatch._disable_current_modes():
                self.slots[place.start] = torch.zeros(1024, dtype=torch.uint8)
            self.races.made_before(self.slots[place.start], f"the slot at {place.start}")
        return self.slots[place.start][: place.stop - place.start]


class Neighbours:
    """`Links` of one rank to peers that give credit at once, and fill a slot as soon as they have credit for it."""

    words: Any = None

    def __init__(self, races: Races, rank: int, rings: dict[Line, Ring], slot_bytes: int) -> None:
        self.races, self.rank, self.rings, self.slot_bytes = races, rank, rings, slot_bytes
        self.coin = random.Random(rank)
        self.flags = {ring.flag: line for line, ring in rings.items()}
        self.memories: defaultdict[int, Slots] = defaultdict(lambda: Slots(races))
        self.writes: dict[tuple[int, int], Event] = {}  # (word, value) -> when it was written
        self.queues = 0
        # Not among this process's streams: what its host has waited for, no other process has.
        self.peers: dict[Line, Stream] = {line: Stream(races, f"peer on {line}", Clock()) for line in rings}

    def memory(self, rank: int) -> Any:
        return self.memories[rank]

    def queue(self) -> Queue:
        self.queues += 1
        return Queue(self, self.races.stream(f"line {self.queues}"))

    def caller(self) -> Queue:
        return Queue(self, self.races.here)

    def fill(self, line: Line, number: int) -> Stream:
        """The peer's stream, after it has copied message `number` of a line into its slot."""
        ring, peer = self.rings[line], self.peers[line]
        if number >= ring.slots:
            peer.wait_event(self.writes[ring.credit, number - ring.slots + 1])
        start = ring.start + number % ring.slots * self.slot_bytes
        with self.races.on(peer):
            self.memory(line.target)[start : start + self.slot_bytes].fill_(0)
        return peer


def watch(
    monkeypatch: pytest.MonkeyPatch, rank: int = 0, kind: type[streams.CudaStreams] = streams.CudaStreams
) -> Races:
    """From now on this process is rank `rank` of a run on GPUs: where CPU streams would be made, CUDA's are, over
    streams of the result, and play pairs in their order."""
    races = Races()
    monkeypatch.setattr(torch.cuda, "stream", races.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: races.here)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(races))
    side: Any = streams.SideStreams(races.stream("comm"), races.stream("wgrad"))  # type: ignore[arg-type]
    monkeypatch.setattr(streams, "CpuStreams", lambda: kind(torch.device("cpu"), side))
    monkeypatch.setitem(ORDERS, "cpu", ORDERS["cuda"])
    nccl = Nccl(races, rank)
    for name in (
        *("new_group", "get_process_group_ranks", "get_rank"),
        *("isend", "irecv", "all_reduce", "all_gather_object"),
    ):
        monkeypatch.setattr(dist, name, getattr(nccl, name))
    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
        monkeypatch.setattr(dist, name, nccl.reduce_scatter, raising=False)
    for name in ("all_gather_into_tensor", "all_gather_single"):
        monkeypatch.setattr(dist, name, nccl.all_gather, raising=False)
    return races
