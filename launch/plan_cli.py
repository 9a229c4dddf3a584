"""`dryvine plan`: what a config will take in memory, time and money, without a GPU and without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dryvine.launch.plan.hardware import Machine, load_hardware, names
from dryvine.trainer.config import RunConfig

ConfigFile = Annotated[Path, typer.Argument(help="a TOML file, see configs/", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="table.key=value ...", show_default=False)]
HardwareName = Annotated[
    str, typer.Option(help=f"{', '.join(names())}, or a TOML file; empty: the config's", show_default=False)
]
Price = Annotated[float | None, typer.Option(min=0, help="dollars for an hour of one GPU", show_default=False)]


def machine_of(asked: str, run: RunConfig, price: float | None) -> Machine:
    """The hardware that is asked for, else the config's, else a CPU for runs on one and an H100 for others."""
    machine = load_hardware(asked or run.hardware or ("cpu" if run.device == "cpu" else "h100"))
    return machine if price is None else machine.model_copy(update={"dollars": price})


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    hardware: HardwareName = "",
    price: Price = None,
    as_json: Annotated[bool, typer.Option("--json", help="figures for a program")] = False,
    html: Annotated[Path | None, typer.Option(help="write a page there")] = None,
) -> None:
    """What a run will take: memory by rank, bytes by link, a step's time and where it goes, GPU hours, money."""
    from rich.console import Console

    from dryvine.launch.plan.plan import make
    from dryvine.launch.plan.summary import figures, show
    from dryvine.trainer.run_plan import load_plan

    run = load_plan(config, overrides or ())
    made = make(run, machine_of(hardware, run.config.run, price))
    if as_json:
        typer.echo(json.dumps(figures(made), indent=1))
    else:
        show(made, Console(highlight=False))
