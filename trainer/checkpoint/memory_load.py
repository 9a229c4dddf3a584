"""Resuming from copies in memory: the newest step for which some host has a sound copy of every rank's state.

Ranks exchange lists of what their hosts have. A rank whose own node has its copy reads that one; a rank on a new node
receives it from a host that has it. Copies that are damaged, of another layout or of other data are skipped, until a
complete step is found, or none is left and storage is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

from dryvine.comm.buddies import allocate, swap_files
from dryvine.comm.mesh import Mesh
from dryvine.comm.watch import naming
from dryvine.trainer.checkpoint import attempts, run_folder
from dryvine.trainer.checkpoint.attempts import MemoryCopy
from dryvine.trainer.checkpoint.files import Place
from dryvine.trainer.checkpoint.load import load
from dryvine.trainer.checkpoint.manifest import CheckpointError, Manifest
from dryvine.trainer.checkpoint.reader import SafetensorsReader
from dryvine.trainer.checkpoint.state import RunState
from dryvine.trainer.config import RunConfig
from dryvine.trainer.data.identity import DataIdentity


class Seen(NamedTuple):
    """A copy, and a rank whose host has it."""

    rank: int
    copy: MemoryCopy


class Recalled(NamedTuple):
    step: int | None  # None: nothing in memory could be used
    sent: int  # of the ranks' copies, those that came from another node
    passed_over: list[str]  # why, of each copy that was not used


class _Choice(NamedTuple):
    """A step of an attempt, and the copy that each rank loads."""

    step: int
    by_owner: dict[int, Seen]


def recall(run: RunConfig, mesh: Mesh, node: int, identity: DataIdentity, state: RunState) -> Recalled:
    """Load `state` from the newest complete step in memory, unless storage has a newer one. `node` is the number of
    this rank's. Collective."""
    newest = run_folder.newest(run.folder)
    at_least = cast(list[int], mesh.gather(run_folder.step_of(newest) if newest else 1, "the newest checkpoint"))[0]
    gathered = cast(list[list[MemoryCopy]], mesh.gather(list(attempts.found(run)), "copies in memory"))
    seen = [Seen(rank, copy) for rank, of in enumerate(gathered) for copy in of if copy.step >= at_least]
    passed_over: list[str] = []
    while choice := _newest_whole(seen, mesh.size):
        wrong = _bring(run, mesh, node, choice)
        reader = SafetensorsReader(_path(run, node, choice, mesh.rank))
        try:
            wrong = wrong or next(_unfit(reader, identity, state), "")
        except CheckpointError as error:
            wrong = str(error)
        every = cast(list[str], mesh.gather(wrong, "what is wrong with copies in memory"))
        if not any(every):
            load(reader, state, mesh)
            sent = sum(one.rank != owner for owner, one in choice.by_owner.items())
            return Recalled(choice.step, sent, passed_over)
        passed_over += [f"rank {rank}'s of step {choice.step}: {said}" for rank, said in enumerate(every) if said]
        bad = [choice.by_owner[rank].copy for rank, said in enumerate(every) if said]
        seen = [one for one in seen if one.copy not in bad]
    return Recalled(None, 0, passed_over)


def _newest_whole(seen: list[Seen], ranks: int) -> _Choice | None:
    """The newest step with a copy of every rank, all of one attempt. A rank prefers the copy of its own host."""
    steps = {(one.copy.step, one.copy.attempt) for one in seen}
    for step, attempt in sorted(steps, reverse=True):
        of = [one for one in seen if (one.copy.step, one.copy.attempt) == (step, attempt)]
        of.sort(key=lambda one: (one.rank == one.copy.owner, -one.rank))  # the dict below keeps the last
        by_owner = {one.copy.owner: one for one in of}
        if by_owner.keys() == set(range(ranks)):
            return _Choice(step, by_owner)
    return None


def _path(run: RunConfig, node: int, choice: _Choice, rank: int) -> Path:
    """Where a rank's copy is, or will be once it has been received from another host."""
    rank_of, copy = choice.by_owner[rank]
    return copy.path if rank_of == rank else run_folder.named(attempts.home(run, copy.attempt, node, rank), copy.step)


def _bring(run: RunConfig, mesh: Mesh, node: int, choice: _Choice) -> str:
    """Transfer the copies that ranks load from other hosts. Returns why this rank cannot receive its own."""
    sent = {owner: one for owner, one in choice.by_owner.items() if one.rank != owner}
    path = _path(run, node, choice, mesh.rank)
    why = _make_room(run, path, sent[mesh.rank].copy) if mesh.rank in sent else ""
    every = mesh.gather(why, "room for copies in memory")
    sent = {owner: one for owner, one in sent.items() if not every[owner]}
    arriving = {sent[mesh.rank].rank: attempts.files(path, mesh.rank)} if mesh.rank in sent else {}
    leaving = {owner: attempts.files(one.copy.path, owner) for owner, one in sent.items() if one.rank == mesh.rank}
    due = tuple((rank, 0) for rank in (*leaving, *arriving))
    with naming(mesh.watch, "copies from the memory of other nodes", due):
        swap_files(leaving, arriving)
    return why


def _make_room(run: RunConfig, path: Path, copy: MemoryCopy) -> str:
    """Allocate the files that will be received. Returns why that failed, or nothing."""
    try:
        attempts.make_folder(run, copy.attempt)
        path.mkdir(parents=True, exist_ok=True)
        for file, size in zip(attempts.files(path, copy.owner), copy.sizes, strict=True):
            allocate(file, size)
    except OSError as full:
        return f"{path}: {full.strerror}"
    return ""


def _unfit(reader: SafetensorsReader, identity: DataIdentity, state: RunState) -> Iterator[str]:
    """Reasons why a rank cannot resume from a copy."""
    manifest = reader.manifest
    yield from (wrong for name in manifest.files for wrong in reader.damage(name))
    if _places(manifest) != {place: tuple(tensor.shape) for place, tensor in state.tensors().items()}:
        yield f"{reader.path}: of another layout or model"
    if (manifest.data, manifest.tokenizer) != identity:
        yield f"{reader.path}: of other data or another tokenizer"


def _places(manifest: Manifest) -> dict[Place, tuple[int, ...]]:
    return {Place(tensor.name, tensor.first, tensor.field): tensor.shape for tensor in manifest.tensors}
