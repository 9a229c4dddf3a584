"""What a host can check of a run alone: a process before it meets others, `doctor --before-run` on every node."""

from __future__ import annotations

import torch

from dryvine.comm.agreement import Disagreement
from dryvine.comm.dispatch.choose import check_library
from dryvine.comm.extras import LibraryMissing
from dryvine.comm.place import PlaceError
from dryvine.trainer.begin import check_source
from dryvine.trainer.checkpoint.manifest import CheckpointError
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.splits import Data
from dryvine.trainer.fp8.choose import CannotRun, check_engine
from dryvine.trainer.journal import same_run
from dryvine.trainer.rl.prompt_source import PromptSource
from dryvine.trainer.rl.questions import check_verifiers
from dryvine.trainer.sources import open_sources
from dryvine.trainer.wandb_board import check_wandb

# Why a run does not start: the message is one line, with the fix.
REFUSED = (ConfigError, DataError, CannotRun, LibraryMissing, CheckpointError, PlaceError, Disagreement)


def open_checked(config: Config, device: torch.device, verifies: bool, world: int | None = None) -> Data:
    """The data of a run that this host can take part in: libraries that the config names load, the data and
    `run.init_from` are there, and so are the verifiers, where this process `verifies`. `world` is that of
    `check_library`. Raises one of REFUSED."""
    check_engine(config.fp8, device, (config.model.ffn, config.model.expert_ffn))
    check_library(config.comm.dispatcher, world)
    check_wandb(config)
    data = open_sources(config)
    if isinstance(data.train, PromptSource) and verifies:
        check_verifiers(data.train.task)
    same_run(config, data.identity)
    check_source(config)
    return data
