"""`dryvine report` and `dryvine watch`: what a run has done, as a page and in the terminal. Neither needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dryvine.launch.files import write_file

RunFolders = Annotated[list[Path], typer.Argument(help="run folders, such as runs/tiny_cpu", show_default=False)]
OneRun = Annotated[Path, typer.Argument(help="a run folder", show_default=False)]


def report(
    runs: RunFolders,
    out: Annotated[Path | None, typer.Option(help="where the page goes; else report.html in the first run")] = None,
) -> None:
    """One self-contained page of a run, or of several compared: losses, speed, bubble, experts, memory, events."""
    from dryvine.launch.report.page import report_page
    from dryvine.launch.report.runs import RunFolder

    path = out or runs[0] / "report.html"
    text = report_page(RunFolder.open_all(runs))
    write_file(path, text)
    typer.echo(f"wrote {path}")


def watch(
    run: OneRun,
    every: Annotated[float, typer.Option(min=0.1, help="seconds between looks")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="show the newest figures and leave")] = False,
) -> None:
    """A run's newest figures in the terminal, as they are written, until its last step. Output to a file or a pipe
    cannot be drawn over: there they are shown once."""
    from dryvine.launch.report.watch import watch as look

    look(run, Console(), every, once)
