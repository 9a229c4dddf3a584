"""Messages of commands on stderr: always one line, whatever user input they quote."""

from __future__ import annotations

import sys


def say(what: object) -> None:
    """Print a message after the program's name. Control characters are escaped as in Python, so that a key of a config
    can neither colour the line nor break it in two."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(what))
    print(f"dryvine: {line}", file=sys.stderr, flush=True)
