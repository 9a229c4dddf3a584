"""Text for benchmarks, on any host."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from dryvine.trainer.data.build import build
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.spec import BuildSpec


def corpus_folder(out: Path, vocab: int) -> Path:
    return out / f"corpus-{vocab}"


def corpus(out: Path, vocab: int) -> Path:
    """A dataset of standard library files, in a folder of `out`."""
    folder = corpus_folder(out, vocab)
    files = match_files([str(Path(sysconfig.get_path("stdlib")) / "[a-d]*.py")])
    build(files, BuildSpec(vocab_size=vocab, validation_fraction=0.3), folder)
    return folder
