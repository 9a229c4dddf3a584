"""Loss spikes: the run returns to its newest checkpoint and skips the data that it has read since.

PaLM's team did this by hand (arXiv 2204.02311, section 5.1: spikes depend on data and weights together, so other data
from the same weights cause none). Skipped sequences are recorded in rollbacks.jsonl, and which sequences a step reads
is a pure function of its number and that file: a run that is restarted, in any layout, reads the same ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from dryvine.trainer.ramps import Point
from dryvine.trainer.run_rows import append, read

WINDOW = 20  # losses whose median a new one is compared with; before there are so many, none is a spike
STRIKES = 3  # spikes after the same checkpoint that end a run
FILE = "rollbacks.jsonl"


class LossSpike(RuntimeError):
    """A step's loss is far above those before it."""

    def __init__(self, point: Point, loss: float, usual: float) -> None:
        super().__init__(f"step {point.step + 1} has loss {loss:.4g}, {loss / usual:.2g} times the usual {usual:.4g}")
        self.point, self.loss, self.usual = point, loss, usual


class SpikeWatch:
    """Keeps the last losses. A start of the run and a rollback begin with an empty one."""

    def __init__(self, factor: float | None) -> None:
        """A loss above `factor` times the median is a spike; None disables detection."""
        self.factor = factor
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def see(self, point: Point, loss: float) -> LossSpike | None:
        """Add a loss. Returns the spike if it is one. Losses that are not finite are handled by `nonfinite`."""
        full = len(self._losses) == WINDOW
        if self.factor and full and float("inf") > loss > self.factor * (usual := median(self._losses)):
            return LossSpike(point, loss, usual)
        self._losses.append(loss)
        return None


@dataclass(frozen=True)
class Rollback:
    """A line of rollbacks.jsonl."""

    step: int  # that spiked, counted from 1
    loss: float
    usual: float
    to_step: int  # of the checkpoint that the run went on from
    first: int  # number of the first skipped sequence
    sequences: int

    def __str__(self) -> str:
        last = self.first + self.sequences - 1
        return f"back to step {self.to_step}; sequences {self.first} to {last} are passed over ({FILE})"


def write_down(folder: Path, one: Rollback) -> None:
    """Append a line to rollbacks.jsonl. Raises CannotWrite."""
    append(folder, FILE, asdict(one))


def rollbacks(folder: Path) -> list[Rollback]:
    """The rollbacks of a run folder, in order."""
    return [Rollback(**row) for row in read(folder, FILE)]


def passing_over(points: Iterable[Point], past: Iterable[Rollback]) -> Iterator[Point]:
    """The steps, each with the number of sequences that were skipped before it."""
    past = list(past)
    for point in points:
        yield point._replace(passed_over=sum(one.sequences for one in past if one.to_step <= point.step))
