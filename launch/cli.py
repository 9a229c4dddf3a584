"""`dryvine`: one typer app. A command imports what it needs when it runs, so those that need no torch start at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dryvine.launch import (
    bench_comm,
    checkpoint_cli,
    data_cli,
    eval_cli,
    generate_cli,
    hand_off_cli,
    launch_cli,
    prune_cli,
    rl_cli,
)
from dryvine.launch.data_peek_cli import peek
from dryvine.launch.data_quality_cli import dedup, stats
from dryvine.launch.demos_cli import demos
from dryvine.launch.doctor import doctor
from dryvine.launch.options import ConfigFile, Overrides, Restarts
from dryvine.launch.plan_cli import HardwareName, machine_of, plan, profile
from dryvine.launch.report_cli import report, watch
from dryvine.launch.schedule_cli import schedule
from dryvine.launch.start import start
from dryvine.launch.verifier_cli import check_verifier
from dryvine.trainer.config import ConfigError
from dryvine.trainer.faults import FAULTS, in_a_line
from dryvine.trainer.say import say

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pretrain mixture-of-experts models.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure this machine.")
bench.command("comm")(bench_comm.comm)
for command in (peek, stats, dedup):
    data_cli.app.command()(command)
app.add_typer(data_cli.app, name="data")
app.add_typer(checkpoint_cli.app, name="checkpoint")
app.add_typer(launch_cli.app, name="launch")
app.add_typer(bench, name="bench")
app.command()(demos)
app.command()(doctor)
app.command()(plan)
app.command()(profile)
app.command()(report)
app.command()(watch)
app.command()(schedule)
app.command()(rl_cli.sft)
app.command()(rl_cli.rl)
app.command()(generate_cli.generate)
app.command()(generate_cli.chat)
app.command("eval")(eval_cli.evaluate)
app.command()(hand_off_cli.export)
app.command()(prune_cli.prune)
app.command()(check_verifier)
app.command("import")(hand_off_cli.import_)

OneGpu = Annotated[bool, typer.Option("--one-gpu", help="shrink any config to one rank, for a debugger")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    max_restarts: Restarts = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, simulate and size everything; train nothing.")
    ] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="With --dry-run: the rank written out; else 0.")] = None,
    hardware: HardwareName = "",
    one_gpu: OneGpu = False,
) -> None:
    """Train on this machine: in this process if the layout has one rank and is not to be started again, else in one
    process per rank. Exit code 0: finished; 1: a fault; 2: refused; 3: diverged; 75: stopped by a signal and saved."""
    if (rank is not None or hardware) and not dry_run:
        raise ConfigError("--rank and --hardware are for --dry-run: add it, or leave them out")
    if max_restarts and dry_run:
        raise ConfigError("--max-restarts is for a run, and --dry-run starts none: leave one out")
    if one_gpu:
        config, overrides = _one_gpu(config, overrides or ()), None
    from dryvine.trainer.run_plan import load_plan

    planned = load_plan(config, overrides or ())
    if dry_run:
        from dryvine.launch.dry_run import dry_run as play

        return play(planned, machine_of(hardware, planned.config.run, None), rank or 0, Console())
    raise typer.Exit(start(planned, [str(config), *(overrides or ())], max_restarts))


def _one_gpu(config: Path, overrides: Sequence[str]) -> Path:
    """The config of `--one-gpu`, sized for half of the GPU's memory, or 1 GB on a CPU, so that steps are quick."""
    import torch

    from dryvine.launch.one_gpu import write_one_gpu

    on_gpu = torch.cuda.is_available()
    path, lines = write_one_gpu(config, overrides, torch.cuda.mem_get_info()[1] / 2 if on_gpu else 1e9)
    typer.echo("\n".join(lines))
    return path


@app.command()
def verify(config: ConfigFile, overrides: Overrides = None, device: str = "cpu") -> None:
    """Train three steps in FP32, in the config's layout and as one process, and compare the loss, every gradient, the
    gradient norm and the weights; on GPUs then the layout twice in its own dtypes, for the same bits. On CPU ranks of
    this machine, with --device cuda on its GPUs, under torchrun on the ranks that it started. Exit code 1 if the
    layouts differ by more than 1e-5, or the two runs at all."""
    from dryvine.trainer.run_plan import load_plan
    from dryvine.trainer.verify import run

    raise typer.Exit(0 if run(load_plan(config, overrides or ()).config, device, Console()) else 1)


CommandLineError: type[typer.BadParameter] = typer.BadParameter.__mro__[2]  # click has no public way to it here


def main() -> None:
    """Run the app. A user error prints one line on stderr and exits with 2, a fault that is not the program's own with
    1, without a traceback."""
    try:
        sys.exit(app(standalone_mode=False))
    except CommandLineError as error:
        if message := error.format_message().rstrip("."):  # none where help was printed
            say(f"{message}; see --help")
    except typer.Abort:
        sys.exit(130)
    except FAULTS as error:
        if (line := in_a_line(error)) is None:
            raise
        say(line)
        sys.exit(1)
    except ValueError as error:
        if type(error) is ValueError:
            raise
        say(error)
    sys.exit(2)


if __name__ == "__main__":
    main()
