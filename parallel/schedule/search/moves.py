"""The changes that the annealing tries: swap, pair, part, move, and split or join a backward.

Half of them change one rank. The others make the same change to one microbatch's op on several neighbouring ranks: a
wave that is slowed on one rank only is slowed everywhere, so one rank at a time may have no better neighbour to go to.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from dryvine.parallel.schedule.search.fold import Letter, Letters, Row

# (row, slot, letter in it, random numbers) -> the row after the move, None where it does not apply
Move = Callable[[Row, int, Letter, random.Random], Row | None]


def propose(rows: list[Row], rng: random.Random) -> dict[int, Row] | None:
    """A change: rank -> new row; None where the drawn move does not apply."""
    move = rng.choices(MOVES, WEIGHTS)[0]
    rank = rng.randrange(len(rows))
    at = rng.randrange(len(rows[rank]))
    letter = rng.choice(rows[rank][at])
    if rng.random() < 0.5:
        row = move(rows[rank], at, letter, rng)
        return None if row is None else {rank: row}
    return _wave(rows, (rank, at), letter, move, rng)


def _wave(
    rows: list[Row], place: tuple[int, int], letter: Letter, move: Move, rng: random.Random
) -> dict[int, Row] | None:
    """The move of the letter at `place` (rank, slot), and the same for the same microbatch on the ranks round it, with
    the same random numbers."""
    rank, at = place
    number, seed = sum(slot.count(letter) for slot in rows[rank][:at]), rng.random()
    low, high = rank - int(rng.expovariate(0.5)), rank + int(rng.expovariate(0.5))
    changes: dict[int, Row] = {}
    for r in range(max(0, low), min(len(rows), high + 1)):
        slot = _find(rows[r], letter, number)
        row = None if slot is None else move(rows[r], slot, letter, random.Random(seed))
        if row is not None:
            changes[r] = row
    return changes or None


def _find(row: Row, letter: Letter, number: int) -> int | None:
    """The slot that holds the letter for the `number`-th time, counted from 0."""
    for i, slot in enumerate(row):
        if letter in slot:
            number -= slot.count(letter)
            if number < 0:
                return i
    return None


def _swap(old: Row, at: int, letter: Letter, rng: random.Random) -> Row | None:
    """The slot and the one after it change places."""
    if at + 1 == len(old) or old[at] == old[at + 1]:
        return None
    return [*old[:at], old[at + 1], old[at], *old[at + 2 :]]


def _pair(old: Row, at: int, letter: Letter, rng: random.Random) -> Row | None:
    """Two single slots, this and the next, become a pair."""
    if at + 1 == len(old) or len(old[at]) + len(old[at + 1]) > 2:
        return None
    return [*old[:at], old[at] + old[at + 1], *old[at + 2 :]]


def _part(old: Row, at: int, letter: Letter, rng: random.Random) -> Row | None:
    """A pair becomes two slots, in either order."""
    if len(old[at]) == 1:
        return None
    alone, other = _without(old[at], letter), (letter,)
    first, second = (alone, other) if rng.random() < 0.5 else (other, alone)
    return [*old[:at], first, second, *old[at + 1 :]]


def _move(old: Row, at: int, letter: Letter, rng: random.Random) -> Row | None:
    """The letter goes elsewhere, mostly near."""
    row = list(old)
    _take(row, at, letter)
    far = 1 + int(rng.expovariate(0.4))
    _insert(row, letter, max(0, min(len(row), at + far if rng.random() < 0.5 else at - far)), rng)
    return row


def _split(old: Row, at: int, letter: Letter, rng: random.Random) -> Row | None:
    """B becomes I, with a W not long after; or I becomes B, and takes the next W away."""
    row, (kind, leg) = list(old), letter
    if kind == "B":
        row[at] = _renamed(row[at], letter, ("I", leg))
        _insert(row, ("W", leg), min(len(row), at + 1 + int(rng.expovariate(0.3))), rng)
        return row
    after = next((i for i in range(at + 1, len(row)) if ("W", leg) in row[i]), None)
    if kind != "I" or after is None:
        return None
    _take(row, after, ("W", leg))
    row[at] = _renamed(row[at], letter, ("B", leg))
    return row


MOVES: tuple[Move, ...] = (_swap, _pair, _part, _move, _split)
WEIGHTS = (2, 2, 1, 4, 1)


def _without(slot: Letters, letter: Letter) -> Letters:
    at = slot.index(letter)
    return slot[:at] + slot[at + 1 :]


def _renamed(slot: Letters, old: Letter, new: Letter) -> Letters:
    at = slot.index(old)  # one of them, if both are alike
    return (*slot[:at], new, *slot[at + 1 :])


def _take(row: Row, at: int, letter: Letter) -> None:
    rest = _without(row[at], letter)
    row[at : at + 1] = [rest] if rest else []


def _insert(row: Row, letter: Letter, at: int, rng: random.Random) -> None:
    """Put the letter at `at`: half of the time into the slot there if that holds one op, else as a slot of its own."""
    if rng.random() < 0.5 and at < len(row) and len(row[at]) == 1:
        row[at] = (*row[at], letter)
    else:
        row.insert(at, (letter,))
