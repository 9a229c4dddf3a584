"""Ranks that were not started alike are named with what differs, on every rank, and none hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store

from dryvine.comm.agreement import Disagreement, Statement, agree

ALIKE = {"optim.lr": "0.001", "torch": "2.13.0", "data": "abc"}


def meet(statements: Sequence[Statement], world: int = 0, patience: float = 20.0) -> list[str]:
    """What each rank is told; empty if they agree."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=60))

    def rank(mine: Statement) -> str:
        try:
            agree(store, world or len(statements), mine, patience)
        except Disagreement as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(statements)) as ranks:
        return list(ranks.map(rank, statements))


def states(*changed: tuple[int, dict[str, str]], world: int = 4) -> list[Statement]:
    """Two ranks a host, alike but for what is changed."""
    changes = dict(changed)
    return [Statement(r, "ab"[r // 2], {**ALIKE, **changes.get(r, {})}) for r in range(world)]


def test_alike() -> None:
    assert meet(states()) == [""] * 4


def test_the_odd_host_and_what_it_has_are_named() -> None:
    (told,) = set(meet(states((3, {"optim.lr": "0.002"}))))
    assert told == ("not all ranks were started alike: host b (rank 3): optim.lr is 0.002, not 0.001")


def test_rank_0_may_be_the_odd_one() -> None:
    (told,) = set(meet(states((0, {"torch": "2.11.0"}))))
    assert "host a (rank 0): torch is 2.11.0, not 2.13.0" in told


def test_where_none_are_most_rank_0_counts_and_many_facts_are_counted() -> None:
    other = {"optim.lr": "1", "torch": "2", "data": "3", "new": "4"}
    (told,) = set(meet(states((2, other), (3, other))))
    assert "host b (ranks 2-3): data is 3, not abc; new is 4, not there; optim.lr is 1, not 0.001; and 1 more" in told


def test_a_rank_that_cannot_start_ends_all_at_once() -> None:
    ranks = states()
    ranks[2] = Statement(2, "b", {}, "data/x: no finished dataset here")
    started = time.monotonic()
    (told,) = set(meet(ranks))
    assert told == "host b (rank 2): data/x: no finished dataset here"
    assert time.monotonic() - started < 10


def test_what_all_refuse_is_said_without_hosts() -> None:
    assert set(meet([s._replace(facts={}, refusal="no such file") for s in states()])) == {"no such file"}


def test_other_reasons_are_counted() -> None:
    ranks = [s._replace(facts={}, refusal=f"reason {s.rank // 2}") for s in states()]
    assert set(meet(ranks)) == {"host a (ranks 0-1): reason 0 (and 1 more reasons on other ranks)"}


def test_ranks_that_never_come_are_named() -> None:
    (told,) = set(meet(states()[:2], world=4, patience=1.0))
    assert told.startswith("ranks 2-3 of 4 did not start within 1 s")


def test_without_rank_0_the_others_end_by_themselves() -> None:
    (told,) = set(meet(states()[1:2], patience=0.6))
    assert "rank 0 has not compared the ranks" in told


def test_a_late_rank_is_waited_for() -> None:
    store: Store = HashStore()
    late = threading.Timer(1.5, agree, (store, 2, states()[1], 20.0))
    late.start()
    agree(store, 2, states()[0], 20.0)
    late.join()


@pytest.mark.parametrize("world", [64])
def test_many_ranks(world: int) -> None:
    ranks = [Statement(r, f"n{r // 8}", ALIKE) for r in range(world)]
    ranks[17] = Statement(17, "n2", {**ALIKE, "data": "old"})
    assert set(meet(ranks)) == {"not all ranks were started alike: host n2 (rank 17): data is old, not abc"}
