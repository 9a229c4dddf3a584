"""`dryvine sft` and `dryvine rl`: as `dryvine train`, for configs with an `[sft]` or `[rl]` table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dryvine.launch.options import Overrides, Restarts
from dryvine.launch.start import start

ConfigFile = Annotated[Path, typer.Argument(help="a TOML file with the table [sft] or [rl], see configs/")]


def sft(config: ConfigFile, overrides: Overrides = None, max_restarts: Restarts = 0) -> None:
    """Fine-tune on conversations, with a loss on answers only. Exit codes as of `dryvine train`."""
    raise typer.Exit(_run(config, overrides or [], max_restarts, "sft"))


def rl(config: ConfigFile, overrides: Overrides = None, max_restarts: Restarts = 0) -> None:
    """Learn from verified rewards of sampled answers. Exit codes as of `dryvine train`; 3 also if an alarm ended it."""
    raise typer.Exit(_run(config, overrides or [], max_restarts, "rl"))


def _run(config: Path, overrides: list[str], max_restarts: int, table: str) -> int:
    from dryvine.trainer.config import ConfigError
    from dryvine.trainer.run_plan import load_plan

    planned = load_plan(config, overrides)
    if getattr(planned.config, table) is None:
        has = next((name for name in ("sft", "rl") if getattr(planned.config, name)), "train")
        raise ConfigError(f"{config}: has no table [{table}]; `dryvine {has}` runs it, or add the table (docs/rl.md)")
    return start(planned, [str(config), *overrides], max_restarts)
