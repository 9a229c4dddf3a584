"""`dryvine check-verifier`: score one answer as training does, to see why its reward is what it is."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from dryvine.trainer.rl.verifiers.names import VERIFIERS
from dryvine.trainer.rl.verifiers.pool import Pool, VerifierError
from dryvine.trainer.rl.verifiers.verdict import Job
from dryvine.trainer.say import say

EXAMPLE = """'{"answer": 5}'"""  # as a shell takes it


def check_verifier(
    name: Annotated[str, typer.Argument(help=", ".join(sorted(VERIFIERS)), show_default=False)],
    answer: Annotated[str, typer.Argument(help="the answer's text; - reads it from stdin", show_default=False)],
    problem: Annotated[str, typer.Option(help="The problem's record, as JSON.")] = "{}",
) -> None:
    """Score one answer. Exit code 0: it was scored; 1: it could not be; 2: no such verifier, or no record."""
    try:
        record = json.loads(problem)
        if not isinstance(record, dict):
            raise ValueError("not an object")
    except ValueError as error:
        say(f"--problem {problem!r}: {error}; write a JSON object, for example {EXAMPLE}")
        raise typer.Exit(2) from None
    text = sys.stdin.buffer.read().decode(errors="replace") if answer == "-" else answer
    try:
        with Pool([name], workers=1) as pool:
            (verdict,) = pool.score([Job(name, text, record)])
    except VerifierError as error:
        say(error)
        raise typer.Exit(2) from None
    score = "not scored" if verdict.score is None else f"{verdict.score:g}"
    typer.echo(f"{score}: {verdict.why}" if verdict.why else score)
    raise typer.Exit(int(verdict.score is None))
