"""Datasets of the Hugging Face hub: `--text hf://datasets/OWNER/NAME/PATTERN`, by the hub's own library (extra [hub]).

Files are downloaded into its cache and then read like any others, so a resumed build downloads nothing again. Pin a
revision with `NAME@REVISION`: otherwise the dataset may change between a build and its resume, which is then refused.
"""

from __future__ import annotations

import glob
from pathlib import Path

from dryvine.comm.extras import lacking
from dryvine.trainer.data.config import DataError

HUB = "hf://datasets/"


def fetch(address: str) -> str:
    """Download the files that match, unless they are in the cache. Returns the pattern of the local files. Raises
    DataError."""
    owner, _, rest = address.removeprefix(HUB).partition("/")
    name, _, pattern = rest.partition("/")
    if not (owner and name and pattern):
        raise DataError(f"--text {address!r}: write {HUB}OWNER/NAME/PATTERN, such as {HUB}allenai/c4/en/*.json.gz")
    name, _, revision = name.partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DataError(f"--text {address!r}: {lacking(error)}") from None
    try:
        folder = snapshot_download(
            f"{owner}/{name}",
            repo_type="dataset",
            revision=revision or None,
            allow_patterns=_allowed(pattern),
            ignore_patterns=_ignored(pattern),
        )
    except Exception as error:  # the library's own errors, those of its HTTP client, and ValueError have no common base
        first = str(error).strip().splitlines()[0]
        raise DataError(f"--text {address!r}: {type(error).__name__}: {first}") from None
    return str(Path(folder) / pattern)


def _allowed(pattern: str) -> list[str]:
    """The hub's patterns know no folders: `**/` asks for one there, and here for none, too. A name with brackets is
    also asked for by its name."""
    return [pattern, pattern.replace("**/", ""), glob.escape(pattern)]


def _ignored(pattern: str) -> list[str] | None:
    """And there a `*` matches across folders: without this, `en/*.json` would fetch all that lies below."""
    return None if "**" in pattern else ["*/" * (pattern.count("/") + 1) + "*"]
