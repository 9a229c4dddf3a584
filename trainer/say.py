"""What a command tells its user on stderr: one line, whatever the user's words in it may be."""

from __future__ import annotations

import sys


def say(what: object) -> None:
    """Print it after the program's name. Characters that a terminal would act on are spelled as in Python, so that a
    key of a config can neither colour the line nor break it in two."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(what))
    print(f"dryvine: {line}", file=sys.stderr, flush=True)
