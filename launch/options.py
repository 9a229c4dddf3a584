"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dryvine.trainer.config import ConfigError

ConfigFile = Annotated[Path, typer.Argument(help="a TOML file, see configs/", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="table.key=value ...", show_default=False)]
Restarts = Annotated[int, typer.Option(min=0, help="Start again so often what fails, from its newest save.")]

Experts = Annotated[int, typer.Option(min=1, help="routed experts, on all ranks together")]
TopK = Annotated[int | None, typer.Option(min=1, help="experts that a token uses", show_default="8, or all")]


def used_experts(top_k: int | None, experts: int) -> int:
    """The value of --top-k. Raises ConfigError."""
    if top_k is None:
        return min(8, experts)
    if top_k > experts:
        raise ConfigError(f"--top-k {top_k}: a token has {experts} experts to choose from; see --experts")
    return top_k


def numbers(option: str, text: str, what: str) -> tuple[int, ...]:
    """The value of an option that lists numbers of at least 1, such as 8,8. `what` they are is said where it is
    refused. Raises ConfigError."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"{option} {text}: write {what}, such as 8,8")
    return tuple(map(int, parts))
