"""Measurements between nodes, one rank on each: bandwidth of every pair, clock offsets, and an exchange of what each
found locally.

Pairs are measured in the rounds of a tournament, in which every node has one partner: N nodes take N - 1 rounds, and
pairs disturb each other no more than a run's own traffic does. If most pairs of a node are slow, its cable or port is
bad; a single slow pair between good nodes points to a switch. An all-to-all would give one number that tells neither.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from dryvine.comm.watch import Watch, naming
from dryvine.launch.health.finding import Finding, judged

Pair = tuple[int, int]
Speeds = Mapping[Pair, Sequence[float]]  # GB/s each way, in every round that a pair was in
T = TypeVar("T")
MEGABYTES = {"cpu": 16, "cuda": 256}  # that a pair exchanges, each way
SLOW = 0.5  # of the median of all pairs
TRIES = 4  # rounds that a pair has to be quicker in one of
APART = 1.0  # seconds between clocks, beyond which logs and file times cannot be compared
TIMES = 5  # that a clock is asked; the quickest answer counts


class Node(NamedTuple):
    """What one node knows: its name, its findings, its bandwidth to each partner in GB/s, and its clock offset from
    rank 0 in seconds."""

    name: str
    findings: tuple[Finding, ...]
    speeds: Speeds
    ahead: float


def visit(name: str, findings: Sequence[Finding], device: torch.device, watch: Watch) -> list[Node]:
    """Measure this node against all others, and return all nodes' results by rank. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    speeds = _measure(rank, world, device, watch)
    mine = Node(name, tuple(findings), speeds, _ahead(rank, world, watch))
    return _gathered(mine, "findings of all nodes", watch)


def _measure(rank: int, world: int, device: torch.device, watch: Watch) -> Speeds:
    """This rank's exchanges: every round once, and those with a slow pair up to TRIES times."""
    speeds: dict[Pair, list[float]] = defaultdict(list)
    rounds = list(tournament(world))
    for _ in range(TRIES):
        for pairs in rounds:
            for pair in (pair for pair in pairs if rank in pair):
                speeds[pair].append(_exchange(pair[1] if rank == pair[0] else pair[0], device, watch))
            with naming(watch, "end of a round of pairs", _others(rank, world)):
                dist.barrier()
        # All ranks decide by the same numbers.
        slow = _slow(_fastest(_gathered(dict(speeds), "bandwidths of all nodes", watch)))
        rounds = [pairs for pairs in rounds if not slow.keys().isdisjoint(pairs)]
        if not rounds:
            break
    return dict(speeds)


def _gathered(mine: T, what: str, watch: Watch) -> list[T]:
    """Every rank's, by rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    everyone: list[T | None] = [None] * world
    with naming(watch, what, _others(rank, world)):
        dist.all_gather_object(everyone, mine)
    return [one for one in everyone if one is not None]


def tournament(count: int) -> Iterator[list[Pair]]:
    """Rounds in which each of `count` meets at most one other; together they pair everyone with everyone once."""
    seats = [*range(count), *([-1] if count % 2 else [])]
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in pairs if -1 not in pair]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def _others(rank: int, world: int) -> tuple[tuple[int, int], ...]:
    return tuple((other, 0) for other in range(world) if other != rank)


def _exchange(partner: int, device: torch.device, watch: Watch) -> float:
    """GB/s each way. Measured in the second of two exchanges, since the first one connects."""
    sent = torch.zeros(MEGABYTES[device.type] << 20, dtype=torch.uint8, device=device)
    got = torch.empty_like(sent)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with naming(watch, f"exchange with node {partner}", ((partner, sent.nbytes),)):
            operations = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, got, partner)]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    return sent.nbytes / seconds / 1e9


def _ahead(rank: int, world: int, watch: Watch) -> float:
    """Seconds by which this host's clock is ahead of rank 0's, which answers the others one after the other."""
    if rank:
        return _asked(watch)
    for other in range(1, world):
        for _ in range(TIMES):
            with naming(watch, f"clock of node {other}", ((other, 8),)):
                dist.recv(torch.empty(1, dtype=torch.float64), other)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), other)
    return 0.0


def _asked(watch: Watch) -> float:
    answers = []
    theirs = torch.empty(1, dtype=torch.float64)
    for _ in range(TIMES):
        asked = time.time()
        with naming(watch, "clock of node 0", ((0, 8),)):
            dist.send(torch.zeros(1, dtype=torch.float64), 0)
            dist.recv(theirs, 0)
        answered = time.time()
        answers.append((answered - asked, (asked + answered) / 2 - float(theirs)))
    return min(answers)[1]


def compare(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Findings from all nodes' measurements together."""
    yield from _bandwidth(nodes)
    apart = [f"{node.name} by {node.ahead:+.2f} s" for node in nodes if abs(node.ahead) > APART]
    farthest = max(abs(node.ahead) for node in nodes)
    yield judged(
        not apart, "clocks", ", ".join(apart) or f"within {farthest:.3f} s of {nodes[0].name}'s", "start chronyd there"
    )


def _fastest(by_rank: Sequence[Speeds], tries: int | None = None) -> dict[Pair, float]:
    """Of each pair: its best try of the first `tries`, or of all. Both ends have measured; the slower one waited."""
    found = {}
    for pair in {pair for speeds in by_rank for pair in speeds}:
        ends = [by_rank[end][pair][:tries] for end in pair]
        found[pair] = max(map(min, *ends))
    return found


def _slow(speeds: Mapping[Pair, float]) -> dict[Pair, float]:
    median = statistics.median(speeds.values())
    return {pair: speed for pair, speed in speeds.items() if speed < SLOW * median}


def _bandwidth(nodes: Sequence[Node]) -> Iterator[Finding]:
    measured = [node.speeds for node in nodes]
    speeds = _fastest(measured)
    slow, at_first = _slow(speeds), _slow(_fastest(measured, 1))
    what = f"bandwidth of {len(speeds)} pairs of nodes"
    median = statistics.median(speeds.values())
    span = f"{min(speeds.values()):.2f} to {max(speeds.values()):.2f} GB/s each way, median {median:.2f}"
    if slow:
        yield Finding("bad", what, f"{span}; slow: {_named(slow, nodes)}", _suspected(slow, nodes))
    elif at_first:
        recovered = f"{span}; slow once, and not when measured again: {_named(at_first, nodes)}"
        yield Finding("note", what, recovered, "other work on these hosts or their network")
    else:
        yield Finding("ok", what, span)


def _named(slow: Mapping[Pair, float], nodes: Sequence[Node]) -> str:
    """The worst four."""
    worst = sorted(slow.items(), key=lambda item: item[1])[:4]
    return ", ".join(f"{nodes[a].name} and {nodes[b].name} {speed:.2f}" for (a, b), speed in worst)


def _suspected(slow: Mapping[Pair, float], nodes: Sequence[Node]) -> str:
    often = Counter(rank for pair in slow for rank in pair)
    suspects = [nodes[rank].name for rank, times in often.items() if times > (len(nodes) - 1) / 2]
    return f"check cable and port of {', '.join(suspects)}" if suspects else "check the switch between them"
