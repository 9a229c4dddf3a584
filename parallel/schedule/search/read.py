"""Reading a row: letters to tasks, with what each waits for and makes as numbers, and a check that the rank can run it.

The search evaluates millions of rows, so `read` is one loop over plain tuples. It counts what a rank did before instead
of asking for it: an op's needs on its own rank are an F before each B or I, and an I before each W.
"""

from __future__ import annotations

from dryvine.parallel.schedule.search.fold import NOTHING, NOWHERE, Pipe, Row, Wait

# A slot as the evaluation reads it: its time; the time of it and all after it; the two arrivals that it waits for; the
# two that it makes; and the lag from its end to each of those.
Task = tuple[float, float, int, int, int, int, float, float]
Counts = tuple[int, int, int, int, int, int, int]  # before a slot: F, backwards, deferred W, of each leg; chunks held
Reading = tuple[list[Task], list[Counts]]

UNBOUND = Wait(NOTHING, NOWHERE, 0.0)
START: Counts = (0, 0, 0, 0, 0, 0, 0)


def read(pipe: Pipe, rank: int, slots: Row, at: Counts = START, rest: float = 0.0) -> Reading | None:
    """The tasks of `slots`, which stand after `at` on the rank and before `rest` of time; None if it cannot run them:
    an op before what it needs there, or more chunks held than allowed."""
    prices, memory = pipe.prices, pipe.memory
    waits = pipe.waits[rank]
    f, b, w = [at[0], at[1]], [at[2], at[3]], [at[4], at[5]]
    held = at[6]
    counts, timed = list[Counts](), []
    for slot in slots:
        counts.append((f[0], f[1], b[0], b[1], w[0], w[1], held))
        # The two ops of a pair run at once: neither may need the other, and both are held before either frees.
        done, ready, freed, parts = (f[0], f[1]), [w[0], w[1]], 0, []
        for letter in slot:
            kind, leg = letter
            if kind == "W":
                if not ready[leg]:
                    return None
                ready[leg] -= 1
                w[leg] -= 1
                freed += 1
                parts.append(UNBOUND)
                continue
            if kind == "F":
                parts.append(waits[letter][f[leg]])
                f[leg] += 1
                held += 1
                continue
            if b[leg] >= done[leg]:
                return None
            parts.append(waits[letter][b[leg]])
            b[leg] += 1
            if kind == "I":
                w[leg] += 1
            else:
                freed += 1
        if held > memory:
            return None
        held -= freed
        timed.append((prices[slot], parts))
    # From the end, since each task also says how long the rank needs from it on.
    tasks = list[Task]()
    for time, parts in reversed(timed):
        rest += time
        a, x, p = parts[0]
        other, y, q = parts[1] if len(parts) == 2 else UNBOUND
        tasks.append((time, rest, a, other, x, y, p, q))
    return tasks[::-1], counts
