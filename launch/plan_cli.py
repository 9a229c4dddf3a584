"""`dryvine plan`: what a config will take in memory, time and money, without a GPU and without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dryvine.launch.files import write_file
from dryvine.launch.options import ConfigFile, Overrides
from dryvine.launch.plan.hardware import Machine, load_hardware, names
from dryvine.trainer.config import Config, ConfigError, RunConfig, load

if TYPE_CHECKING:
    from rich.console import Console

HardwareName = Annotated[
    str, typer.Option(help=f"{', '.join(names())}, or a TOML file; empty: the config's", show_default=False)
]
Price = Annotated[float | None, typer.Option(min=0, max=1e6, help="dollars for an hour of one GPU", show_default=False)]


def machine_of(asked: str, run: RunConfig, price: float | None) -> Machine:
    """The requested hardware, else the config's, else the CPU for runs on one and the H100 for others."""
    machine = load_hardware(asked or run.hardware or ("cpu" if run.device == "cpu" else "h100"))
    return machine if price is None else machine.model_copy(update={"dollars": price})


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    hardware: HardwareName = "",
    price: Price = None,
    as_json: Annotated[bool, typer.Option("--json", help="figures for a program")] = False,
    html: Annotated[Path | None, typer.Option(help="write a page there")] = None,
    profile: Annotated[Path | None, typer.Option(help="times measured by `dryvine profile`")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="compare all layouts for as many GPUs as --gpus")] = False,
    gpus: Annotated[int, typer.Option(min=0, help="for --sweep; 0: as many as the config has", show_default=False)] = 0,
) -> None:
    """What a run will take: memory by rank, bytes by link, a step's time and where it goes, GPU hours, money."""
    from rich.console import Console

    if gpus and not sweep:
        raise ConfigError("--gpus is for --sweep; a plan has as many as its layout: set parallel.pp/dp/ep")
    if profile and sweep:
        raise ConfigError("--profile was measured with one size of microbatch, which --sweep varies: leave one out")
    console = Console(highlight=False)
    if sweep:
        _sweep(load(config, overrides or ()), hardware, price, gpus, as_json, html, console)
        return
    from dryvine.launch.plan.plan import make
    from dryvine.launch.plan.profiled import read_profile
    from dryvine.launch.plan.summary import figures, show
    from dryvine.trainer.run_plan import load_plan

    run = load_plan(config, overrides or ())
    made = make(run, machine_of(hardware, run.config.run, price), read_profile(profile) if profile else None)
    if html:
        from dryvine.launch.plan.page import plan_page

        _write(html, plan_page(made))
    if as_json:
        typer.echo(json.dumps(figures(made), indent=1))
    elif not html:
        show(made, console)


def profile(
    config: ConfigFile,
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu")] = "cuda",
    out: Annotated[Path, typer.Option(help="the file that `plan --profile` takes")] = Path("profile.json"),
    rounds: Annotated[int, typer.Option(min=1, help="microbatches of a step")] = 10,
) -> None:
    """Measure the phases of the config's blocks on one GPU, for plans of any layout of the same microbatches. They are
    timed in steps of a model with up to two blocks of each kind."""
    import torch

    from dryvine.launch.profile import measure

    resolved = load(config, overrides or ())
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU; profile where there is one, or with --device cpu")
    measured = measure(resolved, torch.device(device), rounds, lambda kind: typer.echo(f"measuring {kind}", err=True))
    _write(out, measured.model_dump_json(indent=1))


def _sweep(
    config: Config, hardware: str, price: float | None, gpus: int, as_json: bool, html: Path | None, console: Console
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from dryvine.launch.plan import sweep_page
    from dryvine.launch.plan.sweep import sweep

    machine, count = machine_of(hardware, config.run, price), gpus or config.parallel.world
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("layouts", total=1.0)
        rows = sweep(config, count, machine, lambda share: bar.update(task, completed=share))
    if html:
        _write(html, sweep_page.sweep_page(rows, config.run.name, count, machine))
    if as_json:
        typer.echo(json.dumps(sweep_page.sweep_figures(rows), indent=1))
    elif not html:
        sweep_page.show_sweep(rows, console)


def _write(path: Path, text: str) -> None:
    write_file(path, text)
    typer.echo(f"wrote {path}", err=True)
