"""What an export needs from a run folder: the shape, the checkpoint of a step, the tokenizer."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from pydantic import ValidationError

from dryvine.trainer.checkpoint.run_folder import complete, step_of
from dryvine.trainer.checkpoint.stored import Stored
from dryvine.trainer.config import RECORDED, ConfigError, recorded
from dryvine.trainer.data.atomic import write_atomically
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.prepare import prepare
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.names import biases, sizes
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.rl.chat_config import ChatConfig

MODEL = "model.toml"  # of an imported run: its [model] table, for a config to extend
TOKENIZER = "tokenizer"  # of an imported run: the folder with what it was released with


@dataclass(frozen=True)
class OpenRun:
    """A run folder and one of its checkpoints, whose parameters are those of `shape`."""

    folder: Path
    shape: Shape
    stored: Stored

    def tokenizer(self) -> Path | None:
        """Its tokenizer.json, or the folder that has it, if the run's data say so."""
        if (self.folder / TOKENIZER / "tokenizer.json").exists():
            return self.folder / TOKENIZER
        try:
            return Path(chat.tokenizer) if (chat := self.chat()) else prepare(recorded(self.folder).data)
        except (ConfigError, DataError):
            return None

    def chat(self) -> ChatConfig | None:
        """The chat templates that it was fine-tuned with, if it was."""
        if not (self.folder / RECORDED).exists():
            return None
        config = recorded(self.folder)
        tuned = config.sft or config.rl
        return tuned.chat if tuned else None


def open_run(spec: str) -> OpenRun:
    """The checkpoint that RUN or RUN@STEP names, by default the newest. Raises HandOffError or CheckpointError."""
    name, at, step = spec.rpartition("@")
    folder = Path(name if at else spec)
    steps = {step_of(path): path for path in complete(folder)}
    if not steps:
        raise HandOffError(f"{folder}: no checkpoint here; name a run folder, with `checkpoints` in it")
    wanted = step if at else str(max(steps))
    if not wanted.isdigit() or int(wanted) not in steps:
        raise HandOffError(f"{folder}: no checkpoint of step {wanted}; it has {', '.join(map(str, sorted(steps)))}")
    run = OpenRun(folder, read_shape(folder), Stored(steps[int(wanted)]))
    _check_sizes(run)
    return run


def read_shape(folder: Path) -> Shape:
    """The [model] table of a run, imported or not."""
    try:
        if (folder / RECORDED).exists():
            return recorded(folder).model
        return Shape.model_validate(tomllib.loads((folder / MODEL).read_text())["model"])
    except (OSError, tomllib.TOMLDecodeError, KeyError, ConfigError, ValidationError) as error:
        raise HandOffError(f"{folder}: no [model] table to be read: {str(error).splitlines()[0]}") from None


def write_shape(folder: Path, shape: Shape) -> None:
    """The counterpart of `read_shape`, for a folder that is no run yet. Raises CannotWrite."""
    write_atomically(folder / MODEL, tomli_w.dumps({"model": shape.model_dump(mode="json", exclude_none=True)}))


def _check_sizes(run: OpenRun) -> None:
    """The checkpoint must hold exactly the parameters and biases of this shape. Raises HandOffError."""
    wanted = {name: math.prod(size) for name, size in sizes(run.shape).items()}
    wanted |= dict.fromkeys(biases(run.shape), run.shape.routed)
    stored = run.stored.sizes | {name: bias.numel() for name, bias in run.stored.buffers.items()}
    for name in sorted(wanted.keys() | stored.keys()):
        if wanted.get(name) != stored.get(name):
            raise HandOffError(
                f"{run.stored.path}: {name} has {stored.get(name, 0)} elements, and the [model] table of "
                f"{run.folder} asks for {wanted.get(name, 0)}: they are of different models"
            )
