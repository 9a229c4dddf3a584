"""Small checkpoints, of this format and of the one before."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dryvine.comm.mesh import Layout, Mesh, make_mesh
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.save import Keep, Saver
from dryvine.trainer.checkpoint.state import RunState


def mesh(ranks: int = 1) -> Mesh:
    return make_mesh(Layout(ep=ranks), torch.device("cpu"), timedelta(seconds=60))


def piece(first: float, size: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    values = torch.arange(first, first + size, dtype=torch.float32)
    return {"master": values.clone(), "exp_avg": (-values).to(dtype), "step": torch.tensor(5.0)}


def empty(size: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"master": torch.zeros(size), "exp_avg": torch.zeros(size, dtype=dtype), "step": torch.tensor(0.0)}


def state(pieces: Any, buffers: dict[str, Tensor] | None = None, **shapes: tuple[int, ...]) -> RunState:
    """Of parameters without a shape: one dimension, as far as the pieces reach."""
    ends: dict[str, int] = {}
    for (name, first), fields in pieces.items():
        ends[name] = max(ends.get(name, 0), first + len(fields["master"]))
    return RunState(pieces, buffers or {}, {name: (end,) for name, end in ends.items()} | shapes)


def save(folder: Path, step: int, what: RunState, keep: Keep | None = None) -> Path:
    saver = Saver(folder, keep or Keep(2), mesh())
    saver.begin(step, what)
    saver.close()
    return run_folder.named(folder, step)


def old(folder: Path, step: int, content: dict[str, Tensor], **more: object) -> Path:
    """A checkpoint as it was written before there was a manifest."""
    path = run_folder.named(folder, step)
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(content | more, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    (path / "state.json").write_text(json.dumps({"step": step}) + "\n")
    return path


def old_state() -> dict[str, Tensor]:
    pieces = {("w", 0): piece(0.0, 4, torch.bfloat16), ("w", 4): piece(4.0, 6, torch.bfloat16)}
    content = {f"{name}@{first}/{f}": t for (name, first), fields in pieces.items() for f, t in fields.items()}
    return content | {"buffer/bias": torch.tensor([1.0, 2.0])}
