"""The figures of a run at Weights & Biases, where `run.wandb` names a project and the package is installed.

It is not a dependency: most runs are on machines that reach no such service, and the run folder holds the same figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from dryvine.trainer.config import Config, ConfigError


def check_wandb(config: Config) -> None:
    """Raise ConfigError if the config asks for it and it is not there."""
    if config.run.wandb and find_spec("wandb") is None:
        raise ConfigError("run.wandb: the package wandb is not installed; `pip install wandb`, or leave run.wandb out")


class WandbBoard:
    """One run there, by the run folder's name: a resumed run goes on in it."""

    def __init__(self, config: Config) -> None:
        import wandb

        self._run = wandb.init(
            project=config.run.wandb,
            name=config.run.name,
            id=config.run.name,
            resume="allow",
            dir=str(config.run.folder),
            config=config.model_dump(mode="json"),
        )

    def write(self, step: int, figures: Mapping[str, object]) -> None:
        self._run.log({name: value for name, value in figures.items() if value is not None}, step=step)

    def close(self) -> None:
        self._run.finish()
