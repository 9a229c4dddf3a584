"""`dryvine demos`: demonstrations of countdown-3 to fine-tune on before reinforcement learning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dryvine.trainer.data.atomic import CannotWrite


def demos(
    out: Annotated[Path, typer.Option(help="Folder for tokenizer.json, train.jsonl, validation.jsonl and sums.jsonl.")],
    count: Annotated[int, typer.Option(min=1, help="Of demonstrations.")] = 40_000,
    wrong: Annotated[float, typer.Option(min=0, max=1, help="Share that aims at another target.")] = 0.6,
    largest: Annotated[int, typer.Option(min=3, max=99, help="Number of a puzzle.")] = 15,
    seed: int = 0,
) -> None:
    """Write demonstrations of countdown-3 by a teacher that is often wrong."""
    from dryvine.trainer.rl.tasks.countdown_demos import write

    with CannotWrite.naming(out):
        write(out, count, wrong, seed, largest)
    typer.echo(f"{out}: {count} demonstrations, {wrong:.0%} of another target, and 25 tokens")
