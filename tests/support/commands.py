"""Commands as typed, in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from dryvine.launch.cli import app


def invoke(*words: str, stdin: str | None = None) -> tuple[int, str]:
    """Its exit code and stdout. Errors that are not about the words are raised."""
    result = CliRunner().invoke(app, list(words), input=stdin, env={"COLUMNS": "200"}, catch_exceptions=False)
    return result.exit_code, result.stdout
