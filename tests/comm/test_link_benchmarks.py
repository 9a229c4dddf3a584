"""The benchmarks of messages by copy engine, as `torchrun` runs them but on CPU ranks: their soaks compare, and their
tables have every row. Files stand in for GPUs' memory, threads for copy engines, and a clock for events."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.overrides import TorchFunctionMode

from benchmarks.comm import hop2, nvlink
from dryvine.comm import local
from dryvine.comm.dispatch import copy_exchange
from dryvine.comm.dispatch import nvlink as dispatcher
from dryvine.comm.mesh import Layout, Mesh, make_mesh
from tests.support.host_links import open_host_links

CPU = torch.device("cpu")


class OnCpu(TorchFunctionMode):
    """What is asked for on a GPU is made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = CPU
        return func(*args, **kwargs)


class ClockEvent:
    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: ClockEvent) -> float:
        return 1e3 * (end.at - self.at)


@contextmanager
def without_gpus(folder: Path) -> Iterator[None]:
    links = partial(open_host_links, folder)
    with (
        mock.patch.object(dispatcher, "open_links", links),
        mock.patch.object(copy_exchange, "open_links", links),
        mock.patch.object(torch.cuda, "Event", ClockEvent),
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(torch.cuda, "_sleep"),
        mock.patch.object(hop2, "gemm", return_value=lambda: None),  # 69 GFLOP
        OnCpu(),
    ):
        yield


def told(rank: int, folder: Path, name: str, words: Sequence[str]) -> str:
    """What the first rank of a benchmark says in the end; for `local.run`."""
    module, said = {"nvlink": nvlink, "hop2": hop2}[name], StringIO()

    def joined() -> Mesh:
        return make_mesh(Layout(ep=dist.get_world_size()), CPU, timedelta(seconds=60))

    def leave(mesh: Mesh, table: Table) -> None:
        Console(file=said, width=100).print(table)

    with without_gpus(folder), mock.patch.multiple(module, joined=joined, leave=leave):
        mock.patch.object(sys, "argv", [name, *words]).start()
        module.main()
    return said.getvalue()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("name", "words", "rows"),
    [
        ("nvlink", ("--rounds=6", "--tokens=40", "--hidden=256"), ("nvlink", "flat")),
        ("hop2", ("--rounds=8", "--rows=40", "--hidden=64"), ("copies", "all-to-all", "copy")),
    ],
)
def test_it_compares_and_tells_every_row(
    tmp_path: Path, name: str, words: Sequence[str], rows: Sequence[str], ranks: int
) -> None:
    said, *_ = local.run(told, ranks, tmp_path, name, words, deadline=60)
    assert all(f"│ {row} " in said for row in rows)
