"""What a rank is about to run, as names and values that must be equal on every host (`comm/agreement.py`).

Values are short strings: config values as they are, digests of whatever is large. Paths of data are left out, since
hosts may have local copies; the data's fingerprint is compared. The code is compared file by file and not by its
commit: a wheel has none, and a modified checkout has a misleading one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

import dryvine.comm.place
import dryvine.parallel.executor
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.config import Config, flat
from dryvine.trainer.data.splits import Data
from dryvine.trainer.run_plan import RunPlan

ROOMS = tuple(
    Path(module or "").parent
    for module in (
        dryvine.comm.place.__file__,
        dryvine.parallel.executor.__file__,
        __file__,
    )
)
PACKAGES = ("numpy", "triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "transformer-engine", "deep-ep", "deepspeed")
# Paths that may differ between hosts; the contents are compared.
ELSEWHERE = {
    *("data.source", "data.dir", "sft.train", "sft.validation", "sft.chat.tokenizer", "rl.chat.tokenizer"),
    "run.buddy_folder",
}


def facts(plan: RunPlan, data: Data) -> dict[str, str]:
    """The facts of this rank's run. Reads dryvine's source files, about a megabyte."""
    newest = run_folder.newest(plan.config.run.folder)
    return {
        **{name: value for name, value in config_facts(plan.config) if name not in ELSEWHERE},
        **dict(_code()),
        **dict(_versions()),
        "schedule": digest(repr(plan.schedule).encode()),
        "data": str(data.identity.data),
        "tokenizer": str(data.identity.tokenizer),
        f"newest checkpoint in {plan.config.run.folder}": newest.name if newest else "none",
    }


def config_facts(config: Config) -> Iterator[tuple[str, str]]:
    """optim.lr, 0.001; and so on."""
    return ((name, json.dumps(value)) for name, value in flat(config.model_dump(mode="json")))


def _code() -> Iterator[tuple[str, str]]:
    for room in ROOMS:
        for path in sorted(room.rglob("*.py")):
            yield f"code {room.name}/{path.relative_to(room).as_posix()}", digest(path.read_bytes())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _versions() -> Iterator[tuple[str, str]]:
    yield "Python", platform.python_version()
    yield "torch", torch.__version__
    yield "CUDA", str(torch.version.cuda)
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
