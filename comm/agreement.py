"""Checks that all ranks were started alike, before they train; the error names the odd host and what differs there.

A host with another config, another checkout or other data could train for days before anybody notices, or hang the job
in its first collective. So each rank states what it is about to do, as names and values, in the store through which the
ranks meet. Rank 0 compares digests, and the facts behind them only if the digests differ. A rank that cannot start
states why, and all ranks end together with that line, since they would otherwise wait for it until their deadline. A
collective would need a process group first, and one rank that refuses its config would hang the others there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch.distributed import Store

from dryvine.comm.topology import spans

POLL = 0.2  # seconds between polls of the store: its own wait ignores signals, and warns at its timeout
SHOWN = 3  # the most facts that a message names

Facts = Mapping[str, str]


class Statement(NamedTuple):
    """What a rank states. `refusal`: why it cannot start, empty if it can."""

    rank: int
    host: str
    facts: Facts
    refusal: str = ""


class Disagreement(ValueError):
    """Ranks differ, or one cannot start. The message names hosts, ranks and facts, and is the same on all ranks."""


def agree(store: Store, world: int, mine: Statement, patience: float) -> None:
    """Return when all ranks have stated the same facts. Raises Disagreement on every rank, after `patience` seconds
    also if ranks are missing. Collective."""
    digest = hashlib.sha256(json.dumps(sorted(mine.facts.items())).encode()).hexdigest()
    store.set(f"facts of {digest}", json.dumps(dict(mine.facts)))
    store.set(_of(mine.rank), json.dumps([mine.rank, mine.host, digest, mine.refusal]))
    if mine.rank == 0:
        store.set("verdict", _verdict(store, world, patience))
    # Rank 0 starts waiting after its own statement, which may be that much later than this rank's.
    if not _wait(store, ["verdict"], 2 * patience):
        raise Disagreement(
            f"rank 0 has not compared the ranks in {2 * patience:g} s: its host is gone, or still starts"
        )
    if verdict := store.get("verdict").decode():
        _leave_together(store, world, mine.rank)
        raise Disagreement(verdict)


def _of(rank: int) -> str:
    return f"statement of {rank}"


def _wait(store: Store, keys: list[str], seconds: float) -> bool:
    """Whether all keys are in the store within `seconds`."""
    until = time.monotonic() + seconds
    while not store.check(keys):
        if time.monotonic() > until:
            return False
        time.sleep(POLL)
    return True


def _leave_together(store: Store, world: int, rank: int) -> None:
    """The store ends with rank 0, so rank 0 stays until the others have read the verdict, at most 5 s."""
    if store.add("read", 1) == world:
        store.set("all have read", "")
    if rank == 0:
        _wait(store, ["all have read"], 5.0)


class _Stated(NamedTuple):
    rank: int
    host: str
    digest: str
    refusal: str


def _verdict(store: Store, world: int, patience: float) -> str:
    """Why the ranks cannot train together; empty if they can."""
    if not _wait(store, [_of(rank) for rank in range(world)], patience):
        here = [rank for rank in range(world) if store.check([_of(rank)])]
        return _refusals(_stated(store, here)) or _missing(sorted(set(range(world)) - set(here)), world, patience)
    stated = _stated(store, range(world))

    def facts(digest: str) -> Facts:
        found: Facts = json.loads(store.get(f"facts of {digest}"))
        return found

    return _refusals(stated) or _differences(stated, facts)


def _stated(store: Store, ranks: Iterable[int]) -> list[_Stated]:
    return [_Stated(*json.loads(text)) for text in store.multi_get([_of(rank) for rank in ranks])]


def _missing(ranks: Sequence[int], world: int, patience: float) -> str:
    return (
        f"{_ranks(ranks)} of {world} did not start within {patience:g} s: look at the launcher's output of their "
        "hosts, and whether these reach rank 0"
    )


def _refusals(stated: Sequence[_Stated]) -> str:
    """One line per reason, with the hosts that have it; without hosts if all refuse alike."""
    refused = [each for each in stated if each.refusal]
    if not refused:
        return ""
    reason = refused[0].refusal
    same = [each for each in refused if each.refusal == reason]
    where = "" if len(same) == len(stated) else f"{_hosts(same)}: "
    more = len({each.refusal for each in refused}) - 1
    return f"{where}{reason}" + (f" (and {more} more reasons on other ranks)" if more else "")


def _differences(stated: Sequence[_Stated], facts: Callable[[str], Facts]) -> str:
    """The ranks that differ from the majority (or from rank 0 if there is none), and how."""
    counts = Counter(each.digest for each in stated)
    if len(counts) == 1:
        return ""
    usual = max(counts, key=lambda digest: (counts[digest], digest == stated[0].digest))
    parts = []
    for digest in counts:
        if digest != usual:
            odd, found = [each for each in stated if each.digest == digest], _compared(facts(digest), facts(usual))
            parts.append(f"{_hosts(odd)}: {found}")
    return "not all ranks were started alike: " + ". ".join(parts)


def _compared(odd: Facts, usual: Facts) -> str:
    names = [name for name in sorted({*odd, *usual}) if odd.get(name) != usual.get(name)]
    shown = [f"{name} is {odd.get(name, 'not there')}, not {usual.get(name, 'there')}" for name in names[:SHOWN]]
    return "; ".join(shown) + (f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _hosts(stated: Iterable[_Stated]) -> str:
    """host a (ranks 0, 1), host b (rank 4)"""
    by_host: defaultdict[str, list[int]] = defaultdict(list)
    for each in stated:
        by_host[each.host].append(each.rank)
    return ", ".join(f"host {host} ({_ranks(ranks)})" for host, ranks in by_host.items())


def _ranks(ranks: Sequence[int]) -> str:
    """rank 3; ranks 0-3, 8"""
    return ("rank " if len(ranks) == 1 else "ranks ") + spans(ranks).replace(" ", ", ")
