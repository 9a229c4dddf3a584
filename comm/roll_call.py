"""Finds who is gone, who failed, and who has not posted its side, by asking every rank's watch over the job's store.

Two rounds. First each rank says what it waits for; a rank that does not answer is dead or stopped. Then each says which
of those operations it should have posted and has not: that rank, and not one that waits for it, is the culprit.
Counting posts by name finds it without a sequence number per communicator, and works for messages as well as
collectives.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

Due = tuple[tuple[int, int], ...]  # (world rank, bytes that it owes)
ROUND = 2.0  # seconds for the second round, in which only living ranks are asked
SHOWN = 8  # operations or ranks that a message names


class Wanted(NamedTuple):
    """An operation that a rank waits for."""

    what: str
    number: int  # how often the rank had posted an operation of this name, this one included
    peers: tuple[int, ...]  # world ranks that take part


def topic(what: str) -> str:
    """The message's name without "sending" or "receiving" and without the peer: the same on both of its sides."""
    message = what.removeprefix("sending ").removeprefix("receiving ")
    return message.partition(" to rank ")[0].partition(" from rank ")[0]


@dataclass(frozen=True)
class RollCallVerdict:
    """What the roll call found: who is missing, and what the others were doing."""

    missing: tuple[int, ...]
    states: dict[int, str]
    trouble: str = ""
    left: tuple[int, ...] = ()  # of the missing: those that parted in order, too early
    last: dict[int, str] = field(default_factory=dict)  # by rank: what it has posted last
    owes: dict[int, str] = field(default_factory=dict)  # by rank: what others wait for and it has not posted

    def message(self, rank: int, what: str, due: Due, age: float) -> str:
        sized = [(peer, size) for peer, size in due if size]
        owing = [(peer, size) for peer, size in sized if peer in self.missing] or sized
        owed = ", ".join(f"{size} bytes from rank {peer}" for peer, size in owing[:SHOWN])
        late = f": {owed}{', ...' * (len(owing) > SHOWN)} did not come in {age:.1f} s" if owed else ""
        return f"rank {rank}: {what}{late}; {self._culprit(what, due)}"

    def _culprit(self, what: str, due: Due) -> str:
        if self.trouble:
            return self.trouble
        lost = [f"rank {rank} {state}" for rank, state in self.states.items() if state.startswith("failed")]
        lost += [f"rank {rank} left before the others" for rank in self.left]
        if silent := [rank for rank in self.missing if rank not in self.left]:
            lost.append(f"rank {', '.join(map(str, silent))} did not answer the roll call: dead or stopped")
        if lost:
            return "; ".join(lost[:SHOWN])
        # Ranks that wait for nothing first: others may be late only because they wait themselves.
        late = [rank for rank, state in self.states.items() if state == "computing"]
        late += [*self.owes, *(peer for peer, size in due if size and not self.states[peer].endswith(what))]
        where = "; ".join(self._state(rank) for rank in list(dict.fromkeys(late))[:SHOWN])
        return "every rank is alive; " + (where or "all wait in the same operation: a slow link")

    def _state(self, rank: int) -> str:
        last = f" (posted last: {self.last[rank]})" if rank in self.last else ""
        unposted = f" and has not posted its side of {self.owes[rank]}" if rank in self.owes else ""
        return f"rank {rank} is {self.states[rank]}{last}{unposted}"


class RollCall:
    """This rank's part in the roll call, of which a job has one. Errors of the store are ignored: a RuntimeError
    means that its host is gone."""

    def __init__(self, store: Any, rank: int, world: int, grace: float) -> None:
        self.rank, self.world, self.grace = rank, world, grace
        self._store = dist.PrefixStore("watch", store.clone())  # its own connection: it may not wait for others'
        self._store.set(f"who/{rank}", json.dumps([socket.gethostname(), os.getpid(), os.getppid()]))

    def called(self) -> bool:
        """Whether some rank has called the roll."""
        return bool(self._store.check(["call"]))

    def leave(self) -> None:
        """This rank exits in order."""
        self._store.set(f"left/{self.rank}", "1")

    def hold(self, state: str, last: str, waiting: Sequence[Wanted], posted: Counter[str]) -> RollCallVerdict:
        """Call the roll, or answer it. `last` is what this rank has posted last, `posted` counts its operations by
        topic."""
        self._store.set("call", "1")
        self._store.set(f"here/{self.rank}", json.dumps([state, last, waiting]))
        here = self._answers("here", range(self.world), self.grace)
        wanted = [Wanted(*op) for _, _, ops in here.values() for op in ops]
        self._store.set(f"owes/{self.rank}", json.dumps(self._owed(wanted, posted)))
        owes = self._answers("owes", here, ROUND)
        missing = tuple(rank for rank in range(self.world) if rank not in here)
        return RollCallVerdict(
            missing,
            states={rank: str(state) for rank, (state, _, _) in here.items()},
            left=tuple(rank for rank in missing if self._store.check([f"left/{rank}"])),
            last={rank: str(last) for rank, (_, last, _) in here.items()},
            owes={rank: owed[0] for rank, owed in owes.items() if owed},
        )

    def _owed(self, wanted: Iterable[Wanted], posted: Counter[str]) -> list[str]:
        """Operations with this rank that others have posted more often than it has."""
        return [op.what for op in wanted if self.rank in op.peers and posted[topic(op.what)] < op.number]

    def _answers(self, key: str, ranks: Iterable[int], grace: float) -> dict[int, Any]:
        """The values that ranks write under `key` in time, by rank."""
        missing, until = set(ranks), time.monotonic() + grace
        while missing and time.monotonic() < until:
            missing = {rank for rank in missing if not self._store.check([f"{key}/{rank}"])}
            time.sleep(0.1 if missing else 0.0)
        return {rank: json.loads(self._store.get(f"{key}/{rank}")) for rank in ranks if rank not in missing}

    def fence(self, rank: int) -> None:
        """Kill a sibling that is stopped (SIGSTOP): no launcher's SIGTERM would reach it."""
        host, pid, parent = json.loads(self._store.get(f"who/{rank}"))
        with suppress(OSError, IndexError):
            state, ppid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            if host == socket.gethostname() and state == "T" and int(ppid) == parent == os.getppid():
                os.kill(pid, signal.SIGKILL)
