"""Released weights to a checkpoint that any layout loads, as a start for training.

The checkpoint holds FP32 master weights and no moments; `run.init_from` trains on it. With `--optimizer-from` it also
gets the moments of the run that the weights came from: then it is a full checkpoint, and that run continues exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dryvine.trainer.checkpoint.run_folder import newest
from dryvine.trainer.checkpoint.stored import Piece, Stored, write_pieces
from dryvine.trainer.data.atomic import CannotWrite
from dryvine.trainer.data.spec import OnProgress
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.hf_config import config_json
from dryvine.trainer.hand_off.names import BIAS, biases, places, sizes
from dryvine.trainer.hand_off.released import Released, open_released
from dryvine.trainer.hand_off.run_files import MODEL, TOKENIZER, OpenRun, write_shape
from dryvine.trainer.hand_off.slices import slices
from dryvine.trainer.hand_off.tokenizer_files import copy_released
from dryvine.trainer.model.initialise import initial
from dryvine.trainer.model.shape import Shape, count_parameters


@dataclass(frozen=True)
class Imported:
    """What was imported, for the report."""

    checkpoint: Path
    shape: Shape
    initialised: tuple[str, ...]  # parameters that the files did not have
    unknown_keys: tuple[str, ...]  # of config.json
    tokenizer: bool

    def report(self, out: Path) -> Iterator[str]:
        """Lines for the user."""
        total, active = count_parameters(self.shape, mtp=True)
        yield f"{self.checkpoint}: {total / 1e9:.3f}B parameters, {active / 1e9:.3f}B active"
        if self.initialised:
            more = f"{self.initialised[0]} and {len(self.initialised) - 1} more"
            yield f"not in the files, and so as a new run of seed 0 has them: {more}"
        if self.unknown_keys:
            yield f"keys of config.json that nothing here reads: {', '.join(self.unknown_keys)}"
        if not self.tokenizer:
            yield "there is no tokenizer.json: name one with --tokenizer when you export"
        yield f'train on it: extends = "{out / MODEL}" in a config, and run.init_from = "{out}"'


def import_hf(folder: Path, out: Path, optimizer: OpenRun | None, on_progress: OnProgress) -> Imported:
    """Write checkpoint 0 of the run folder `out`; with `optimizer`, the checkpoint of that run's step, with its
    moments. Raises HandOffError and CannotWrite."""
    if newest(out) is not None:
        raise HandOffError(f"{out}: has checkpoints already; name a new run folder with --out")
    released = open_released(folder)
    shape = released.shape if optimizer is None else _same_model(released.shape, optimizer)
    shapes = sizes(shape)
    pieces = _reporting(_pieces(released, shapes), sum(map(math.prod, shapes.values())), on_progress)
    if optimizer is not None:
        pieces = _with_moments(pieces, optimizer.stored)
    with CannotWrite.naming(out):
        path = write_pieces(out, optimizer.stored.step if optimizer else 0, pieces, _biases(released), shapes)
    write_shape(out, shape)
    has_tokenizer = copy_released(folder, out / TOKENIZER)
    fresh = tuple(name for name in shapes if name.startswith("mtp.") and released.without_mtp)
    return Imported(path, shape, fresh, released.config.unknown, has_tokenizer)


def _same_model(released: Shape, run: OpenRun) -> Shape:
    """The run's shape, which also has the fields that only training needs, if it computes what the released one
    does. Raises HandOffError otherwise."""
    for key, wanted in config_json(run.shape).items():
        if config_json(released)[key] != wanted:
            raise HandOffError(f"{run.folder}: has {key} = {wanted}, and the checkpoint {config_json(released)[key]}")
    return run.shape


def _pieces(released: Released, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Piece]:
    for place in places(released.shape):
        if place.copy or place.ours.endswith(BIAS):
            continue
        if released.without_mtp and place.ours.startswith("mtp."):
            continue
        for piece in slices(place):
            yield place.ours, piece.start, {"master": released.weights[place.theirs].rows(piece).flatten()}
    if released.without_mtp:
        for name in (name for name in shapes if name.startswith("mtp.")):
            yield from _fresh(name, shapes[name], released.shape)


def _fresh(name: str, size: tuple[int, ...], shape: Shape) -> Iterator[Piece]:
    """A parameter as a new run with seed 0 initialises it; experts one by one."""
    if len(size) < 3:
        yield name, 0, {"master": initial(name, size, 0, shape.init_std).flatten()}
        return
    for expert in range(size[0]):
        values = initial(name, size[1:], 0, shape.init_std, expert).flatten()
        yield name, expert * values.numel(), {"master": values}


def _reporting(pieces: Iterator[Piece], total: int, on_progress: OnProgress) -> Iterator[Piece]:
    done = 0
    for piece in pieces:
        yield piece
        done += piece[2]["master"].numel()
        on_progress("reading weights", done, total)


def _with_moments(pieces: Iterator[Piece], stored: Stored) -> Iterator[Piece]:
    """Each piece with the optimizer state stored for the same elements."""
    for name, first, fields in pieces:
        count = fields["master"].numel()
        kept = {field: stored.read(name, first, count, field) for field in sorted(stored.fields - {"master"})}
        yield name, first, {**fields, **kept}


def _biases(released: Released) -> dict[str, Tensor]:
    """The bias of every gate; zeros where the files have none (V2, and a newly initialised MTP layer)."""
    found = {name: torch.zeros(released.shape.routed) for name in biases(released.shape)}
    for place in places(released.shape):
        if place.ours.endswith(BIAS) and place.theirs in released.weights:
            found[place.ours] = released.weights[place.theirs].rows(next(slices(place)))
    return found
