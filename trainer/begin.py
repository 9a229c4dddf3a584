"""The initial state of a run: its own newest checkpoint, another run's checkpoint, or random weights from its seed.

A run that resumes (`resume`) must be the same run: same model, same data, as if it had never stopped. A run initialised
from another (`run.init_from`) is a new one with its own folder, data order and step 0, for a longer context, other data
or another batch; so only the model's shapes must agree, and differences in the config are printed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

from rich.console import Console

from dryvine.trainer.checkpoint import attempts, run_folder
from dryvine.trainer.checkpoint.load import load, newest_sound, verified
from dryvine.trainer.checkpoint.manifest import CheckpointError
from dryvine.trainer.checkpoint.memory_load import recall
from dryvine.trainer.checkpoint.reader import open_checkpoint
from dryvine.trainer.checkpoint.state import RunState
from dryvine.trainer.config import Config, Tree, dump, flat
from dryvine.trainer.rig import Rig

UNCOMPARED = {
    "run.name",
    "run.out",
    "run.steps",
    "run.init_from",
    "run.init_optimizer",
}  # of no effect on results


def resume(rig: Rig, console: Console, state: RunState | None = None) -> int:
    """Load the newest copy in the memory of the nodes, else the newest checkpoint of the run folder, else what
    `run.init_from` names. `state` is what checkpoints of this run hold, if that is more than the rig's. Returns the
    number of steps done. Raises CheckpointError. Collective."""
    run = rig.config.run
    if (step := _recall(rig, console, state or rig.state())) is not None:
        return step
    found = newest_sound(run.folder, rig.mesh, run.on_damage)
    for damaged in found.passed_over:
        console.print(f"skipped, and set aside: {damaged}", markup=False)
    if found.reader is None:
        if run.init_from is not None:
            _begin_from(rig, Path(run.init_from), console)
        return 0
    loaded = load(found.reader, state or rig.state(), rig.mesh, optional=("ema",))
    rig.restored()
    if rig.optimizer.ema and "ema" in loaded.missing:
        rig.optimizer.ema.restart()
        start = f"optim.ema starts from the weights of step {loaded.step}"
        console.print(f"{found.reader.path} has no average of the weights: {start}")
    return loaded.step


def _recall(rig: Rig, console: Console, state: RunState) -> int | None:
    """Load the newest copy in memory, unless storage has a newer one. Returns its step, None if there is none."""
    run = rig.config.run
    if not run.buddy_every:
        attempts.keep_only(run, rig.mesh)
        return None
    found = recall(run, rig.mesh, rig.node, rig.data.identity, state)
    for why in found.passed_over:
        console.print(f"skipped, in memory: {why}", markup=False)
    if found.step is None:
        return None
    rig.restored()
    console.print(f"step {found.step} was in memory: {found.sent} of {rig.mesh.size} ranks have it from another node")
    return found.step


def check_source(config: Config) -> None:
    """Raise CheckpointError if a new run cannot be initialised from `run.init_from`. Reads its index only."""
    if config.run.init_from is not None and run_folder.newest(config.run.folder) is None:
        try:
            open_checkpoint(Path(config.run.init_from))
        except CheckpointError as error:
            raise CheckpointError(f"run.init_from: {error}") from None


def _begin_from(rig: Rig, source: Path, console: Console) -> None:
    """`source`: a checkpoint, or a run folder, which stands for its newest checkpoint as rank 0 sees it."""
    paths = cast(list[Path], rig.mesh.gather(run_folder.newest(source) or source, "the checkpoint to begin from"))
    reader = verified(paths[0], rig.mesh)
    state, everything = rig.state(), rig.config.run.init_optimizer
    fix = "run.init_from needs a checkpoint of this [model] table's shapes"
    loaded = load(reader, state if everything else _weights(state), rig.mesh, ("ema",), fix)
    rig.restored()
    if rig.optimizer.ema and (not everything or "ema" in loaded.missing):
        rig.optimizer.ema.restart()
    what = "weights and optimizer" if everything else "weights"
    console.print(f"begins with the {what} of {reader.path}, after {loaded.step} steps", markup=False)
    for line in differences(reader.path.parent.parent / "config.toml", rig.config):
        console.print(f"  {line}", markup=False)


def _weights(state: RunState) -> RunState:
    return replace(state, pieces={place: {"master": fields["master"]} for place, fields in state.pieces.items()})


def differences(path: Path, config: Config) -> Iterator[str]:
    """Keys that differ from the config.toml at `path` and change what a run computes, a line each."""
    if not path.exists():
        yield f"{path}: not found, so differences in the config are not known"
        return
    old, new = (tomllib.loads(text) for text in (path.read_text(), dump(config)))
    for kind in sorted(old.keys() ^ new.keys()):  # [sft] and [rl]
        yield f"[{kind}]: {'set -> not set' if kind in old else 'not set -> set'}"
    before, now = (dict(flat(_compared(each, other))) for each, other in ((old, new), (new, old)))
    for key in sorted((before.keys() | now.keys()) - UNCOMPARED):
        if before.get(key) != now.get(key):
            yield f"{key}: {before.get(key, 'not set')} -> {now.get(key, 'not set')}"


def _compared(tree: Tree, other: Tree) -> Tree:
    """The tables that both have, and the chat if both have one: RL after fine-tuning must speak as that did."""
    tables = [cast(Tree, table) for table in (*tree.values(), *other.values())]
    chats = [table["chat"] for table in tables if "chat" in table]
    common: Tree = {name: table for name, table in tree.items() if name in other}
    return common | ({"chat": chats[0]} if len(chats) == 2 and tree.keys() != other.keys() else {})
