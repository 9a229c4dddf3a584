"""A run folder as reports read it: figures by step, expert loads, events. `trainer.journal` writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from dryvine.launch.plan.hardware import load_hardware
from dryvine.launch.plan.plan import Plan, make
from dryvine.trainer.config import Config, ConfigError, recorded
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.run_rows import Figures, read
from dryvine.trainer.spikes import rollbacks


class Event(NamedTuple):
    """Something that happened after a step."""

    step: int
    kind: str  # start | checkpoint | skip | spike | alarm
    what: str


@dataclass(frozen=True)
class RunFolder:
    """What a run has left so far. `name`: what a page calls it."""

    path: Path
    name: str
    config: Config
    rows: list[Figures]

    @staticmethod
    def open_all(paths: Sequence[Path]) -> list[RunFolder]:
        """The runs, each named by the shortest end of its path that no other has; one that is given twice counts
        once. Raises ConfigError as `open` does."""
        given = {path.resolve(): path for path in paths}
        most = max(len(whole.parts) for whole in given)
        names = next(
            names
            for depth in range(1, most + 1)
            if len(set(names := ["/".join(whole.parts[-depth:]) for whole in given])) == len(given)
        )
        return [RunFolder.open(path, name) for path, name in zip(given.values(), names, strict=True)]

    @staticmethod
    def open(path: Path, name: str = "") -> RunFolder:
        """Raises ConfigError if there is no run, or none that has completed a step."""
        config, rows = recorded(path), read(path)
        if not rows:
            raise ConfigError(f"{path}: no step has been recorded yet")
        return RunFolder(path, name or path.resolve().name, config, rows)

    @property
    def reinforced(self) -> bool:
        """Whether it is a run of `dryvine rl`."""
        return self.config.rl is not None

    @property
    def steps(self) -> list[float]:
        return [float(row["step"]) for row in self.rows]

    def column(self, name: str) -> list[float | None]:
        """A figure by step; None where it is unknown."""
        return [row.get(name) for row in self.rows]

    def known(self, name: str) -> list[float]:
        return [value for value in self.column(name) if value is not None]

    @property
    def validations(self) -> list[str]:
        """The columns with validation losses: of all sources, by source, of averaged weights."""
        names = dict.fromkeys(name for row in self.rows for name in row if name.startswith("val_loss"))
        return [name for name in names if self.known(name)]

    @cached_property
    def loads(self) -> list[list[int]]:
        """Tokens by MoE layer and expert in the newest validation; empty without experts."""
        rows = read(self.path, "expert_load.jsonl")
        return rows[-1]["loads"] if rows else []

    @cached_property
    def samples(self) -> list[Figures]:
        """The stored sample answers of an RL run, oldest first."""
        return read(self.path, "samples.jsonl")

    @property
    def plan(self) -> Plan | None:
        """The plan for the hardware that the config names; None where `unplanned` says why."""
        return self._planned[0]

    @property
    def unplanned(self) -> str:
        """Why there is no plan."""
        return self._planned[1]

    @cached_property
    def _planned(self) -> tuple[Plan | None, str]:
        hardware = self.config.run.hardware
        if not hardware:
            return None, "its config names no hardware (run.hardware)"
        try:
            return make(make_plan(self.config), load_hardware(hardware)), ""
        except ConfigError as error:  # a file of the cluster's that is not here, for example
            return None, str(error)

    def mfu(self) -> list[float | None]:
        """MFU by step on the planned hardware; None without one."""
        if self.plan is None:
            return [None] * len(self.rows)
        flop, peak = self.plan.flop_per_token[0], self.plan.machine.peak_bf16 * 1e12 * self.plan.world
        return [rate and rate * flop / peak for rate in self.column("tokens_per_second")]

    def events(self) -> Iterator[Event]:
        """All events in order of steps."""
        found = [
            Event(row["after_step"], "start", f"started at {row['at']}") for row in read(self.path, "starts.jsonl")
        ]
        for row in self.rows:
            if row.get("checkpoint_stall_ms") is not None:
                stall = f"checkpoint, training stood still for {row['checkpoint_stall_ms']:.0f} ms"
                found.append(Event(row["step"], "checkpoint", stall))
            if row.get("skipped"):
                found.append(Event(row["step"], "skip", f"updated nothing ({row['skipped']} in a row): skipped.jsonl"))
        found += [
            Event(one.step, "spike", f"loss {one.loss:.4g}, usual {one.usual:.4g}: {one}")
            for one in rollbacks(self.path)
        ]
        found += [Event(row["step"], "alarm", row["alarm"]) for row in read(self.path, "alarms.jsonl")]
        return iter(sorted(found))
