"""Chooses the GEMM engine: the one that the recipe names, or the fastest on these devices, measured once.

The alternative, a table of the fastest engine by GPU, would be outdated with the next driver. Engines add in different
orders, and copies of a stage (such as those of DualPipe) must round alike, so all ranks use the same one: that whose
time on its slowest rank is shortest. For the same reason the choice is stored in the run folder, and a resumed run uses
it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from dryvine.comm.mesh import Mesh
from dryvine.trainer.fp8.engines.emulate import Emulate
from dryvine.trainer.fp8.engines.mixed import KINDS, Mixed
from dryvine.trainer.fp8.engines.names import ENGINES, make_engine
from dryvine.trainer.fp8.engines.protocol import Products
from dryvine.trainer.fp8.recipe import Recipe
from dryvine.trainer.fp8.trial import Times, fault, milliseconds
from dryvine.trainer.tensors.tiles import TILE

CHOICE_FILE = "fp8_gemm.json"  # in the run folder: the engine of each kind

Measure = Callable[[Mapping[str, Products], torch.device], Times]
Choice = dict[str, str]  # kind -> engine


class CannotRun(ValueError):
    """The recipe's engine cannot run here. The message is one line: why, and which engine can."""


def check_engine(recipe: Recipe, device: torch.device, widths: Sequence[int] = ()) -> None:
    """Raise CannotRun if the engine that the recipe names fails its trial, or it or FFNs of these `widths` cannot run
    on `device`."""
    if not recipe.fp8:
        return
    if recipe.gemm not in ("auto", "emulate"):
        engine = make_engine(recipe.gemm)
        if reason := engine.missing(device):
            raise CannotRun(f"fp8.gemm = '{recipe.gemm}' {reason}")
        if why := fault(engine, device):
            raise CannotRun(f"fp8.gemm = '{recipe.gemm}' fails on {device}: {why}; 'auto' takes one that does not")
    odd = [width for width in widths if width % TILE]
    if odd and device.type == "cuda":
        raise CannotRun(f"[fp8] on a GPU: FFN width {odd[0]} is not a multiple of 128; change model.ffn or expert_ffn")


def choose_engines(recipe: Recipe, mesh: Mesh, folder: Path) -> tuple[Products, str]:
    """The products that all ranks use, and a line for the log. `folder` is the run's. Raises CannotRun. Collective."""
    check_engine(recipe, mesh.device)
    emulate = Emulate(recipe.accumulator, recipe.promotion)
    if recipe.gemm == "emulate":
        return emulate, "fp8.gemm: emulate, as asked"
    if recipe.gemm != "auto":
        return make_engine(recipe.gemm), f"fp8.gemm: {recipe.gemm}, as asked"
    made = {name: make_engine(name) for name in ENGINES if name != "emulate"}
    here = {name: engine for name, engine in made.items() if not engine.missing(mesh.device)}
    faults = {name: why for name, engine in here.items() if (why := fault(engine, mesh.device))}
    choice, why = agree_on_engines({n: e for n, e in here.items() if n not in faults}, mesh, folder, milliseconds)
    why += "".join(f"; left out: {name} ({reason})" for name, reason in faults.items())
    if not choice:
        return emulate, f"fp8.gemm: emulate, the one there is on {mesh.device}{why}"
    return Mixed(*(here[choice[kind]] for kind in KINDS)), f"fp8.gemm: {why}"


def agree_on_engines(able: Mapping[str, Products], mesh: Mesh, folder: Path, measure: Measure) -> tuple[Choice, str]:
    """The engine of each kind, among those that every rank can run, and why. Empty if there is none: all ranks then
    emulate. Collective; rank 0 reads and writes the folder."""
    answers = cast(list[tuple[set[str], Choice]], mesh.gather((set(able), _read(folder, mesh.rank)), "FP8 engines"))
    common = set.intersection(*(names for names, _ in answers))
    lacking = sorted(set.union(*(names for names, _ in answers)) - common)
    note = f" (not on every rank: {', '.join(lacking)})" if lacking else ""
    if not common:
        return {}, note
    # Rank 0's copy counts.
    stored = answers[0][1]
    if stored.keys() == set(KINDS) and set(stored.values()) <= common:
        engines = "; ".join(f"{kind} {stored[kind]}" for kind in KINDS)
        return stored, f"{engines}, as {CHOICE_FILE} of this run has it{note}"
    slowest = _slowest({name: engine for name, engine in able.items() if name in common}, mesh, measure)
    choice = {kind: min(row, key=row.__getitem__) for kind, row in slowest.items()}
    if mesh.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CHOICE_FILE).write_text(json.dumps(choice, indent=1) + "\n")
    return choice, "; ".join(_line(kind, choice[kind], row) for kind, row in slowest.items()) + note


def _slowest(engines: Mapping[str, Products], mesh: Mesh, measure: Measure) -> Times:
    """Each engine's time on its slowest rank, the same on all ranks."""
    times = measure(engines, mesh.device)
    rows = torch.tensor([[times[kind][name] for name in engines] for kind in KINDS], device=mesh.device)
    slowest = mesh.max(rows, "FP8 times").tolist()
    return {kind: dict(zip(engines, row, strict=True)) for kind, row in zip(KINDS, slowest, strict=True)}


def _read(folder: Path, rank: int) -> Choice:
    path = folder / CHOICE_FILE
    return json.loads(path.read_text()) if rank == 0 and path.exists() else {}


def _line(kind: str, best: str, row: Mapping[str, float]) -> str:
    return f"{kind} {best} (" + ", ".join(f"{name} {ms:.2f} ms" for name, ms in row.items()) + ")"
