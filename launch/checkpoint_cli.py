"""`dryvine checkpoint ls|verify|diff`: what a run has saved, whether it is sound, and where two saves differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from dryvine.trainer.checkpoint.inspect import Comparison, Listed, OnRead
    from dryvine.trainer.checkpoint.reader import CheckpointReader

app = typer.Typer(help="What runs have saved.", no_args_is_help=True)
RunFolder = Annotated[Path, typer.Argument(help="A run folder, runs/NAME.", show_default=False)]
Saved = Annotated[Path, typer.Argument(help="A checkpoint, or a run folder for its newest.", show_default=False)]
SHOWN = 20  # tensors that a comparison lists


@app.command()
def ls(run: RunFolder) -> None:
    """List the checkpoints of a run, oldest first; reads their manifests only. Exit code 1 if one cannot be read."""
    from dryvine.trainer.checkpoint.inspect import list_run
    from dryvine.trainer.checkpoint.manifest import CheckpointError

    found = list_run(run)
    if not found:
        raise CheckpointError(f"{run}: no run folder with a checkpoint")
    table = Table("checkpoint", "step", "parameters", "files", "size", "written", "", title=str(run))
    for row in found:
        table.add_row(*_cells(row, newest=row is found[-1]))
    Console().print(table)
    for row in found:
        if row.trouble:
            Console(soft_wrap=True).print(row.trouble, markup=False, style="red")
    raise typer.Exit(1 if any(row.trouble for row in found) else 0)


@app.command()
def verify(
    path: Saved,
    every: Annotated[bool, typer.Option("--all", help="All checkpoints of the run folder.")] = False,
) -> None:
    """Read all of a checkpoint and compare it with its checksums. Exit code 1 if anything is not as it was written."""
    from dryvine.trainer.checkpoint import run_folder

    paths = run_folder.complete(path) if every else [path]
    sound = [_verify(one) for one in paths]
    raise typer.Exit(0 if all(sound) else 1)


@app.command()
def diff(first: Saved, second: Saved) -> None:
    """Compare two checkpoints, of any layouts and formats, tensor by tensor. Exit code 1 if they differ."""
    from dryvine.trainer.checkpoint.inspect import compare, count_fields

    ours, theirs = _open(first), _open(second)
    with _progress("tensors compared", count_fields(ours)) as on_read:
        found = compare(ours, theirs, on_read)
    _print_comparison(found)
    raise typer.Exit(0 if found.alike else 1)


def _open(path: Path) -> CheckpointReader:
    from dryvine.trainer.checkpoint.reader import open_checkpoint

    return open_checkpoint(path)


def _cells(row: Listed, newest: bool) -> tuple[str, ...]:
    size, when = f"{row.bytes / 1e9:,.3f} GB", f"{row.written:%m-%d %H:%M:%S}"
    if row.manifest is None:
        return row.path.name, "?", "?", "?", size, when, "[red]damaged"
    count, files = len(row.manifest.parameters), len(row.manifest.files)
    note = ("newest" if newest else "") + (" (format 1)" if row.manifest.format == 1 else "")
    return row.path.name, f"{row.manifest.step:,}", f"{count:,}", f"{files:,}", size, when, note


def _verify(path: Path) -> bool:
    """Print what is wrong with a checkpoint, or its contents. Returns whether it is intact."""
    from dryvine.trainer.checkpoint.inspect import damage, experts
    from dryvine.trainer.checkpoint.manifest import CheckpointError

    console = Console(soft_wrap=True)
    try:
        reader = _open(path)
        with _progress(reader.path.name, sum(file.bytes for file in reader.manifest.files.values())) as on_read:
            wrong = list(damage(reader, on_read))
    except CheckpointError as error:
        wrong = [str(error)]
    if wrong:
        console.print("\n".join(wrong), markup=False, style="red")
        return False
    manifest, stacks = reader.manifest, experts(reader.manifest)
    counted = f", {sum(stacks.values()):,} experts in {len(stacks):,} stacks" if stacks else ""
    unchecked = "; format 1 has no checksums, so only that it can be read" if manifest.format == 1 else ""
    what = f"step {manifest.step:,}, {len(manifest.parameters):,} parameters, {len(manifest.tensors):,} tensors"
    console.print(f"{reader.path}: sound: {what}{counted}{unchecked}", markup=False)
    return True


def _print_comparison(found: Comparison) -> None:
    console = Console()
    for which, names in (("first", found.only_first), ("second", found.only_second)):
        for name in names[:SHOWN]:
            console.print(f"only in the {which}: {name}", markup=False)
    other = sorted((one for one in found.differences if not one.alike), key=lambda one: -one.relative)
    console.print(f"{len(found.differences) - len(other):,} of {len(found.differences):,} tensors are the same bits")
    if not other:
        return
    table = Table("tensor: field", "elements that differ", "largest difference", "relative, by norm")
    for one in other[:SHOWN]:
        table.add_row(one.what, f"{one.elements:,} of {one.of:,}", f"{one.largest:.3g}", f"{one.relative:.3g}")
    console.print(table)
    if len(other) > SHOWN:
        console.print(f"and {len(other) - SHOWN:,} more that differ less")


@contextmanager
def _progress(title: str, total: int) -> Iterator[OnRead]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda read: bar.advance(task, read)
