"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dryvine.trainer.config import ConfigError

ConfigFile = Annotated[Path, typer.Argument(help="a TOML file, see configs/", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="table.key=value ...", show_default=False)]
Restarts = Annotated[int, typer.Option(min=0, help="Start again so often what fails, from its newest save.")]


def numbers(option: str, text: str, what: str) -> tuple[int, ...]:
    """The value of an option that lists numbers of at least 1, such as 8,8. `what` they are is said where it is
    refused. Raises ConfigError."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"{option} {text}: write {what}, such as 8,8")
    return tuple(map(int, parts))
