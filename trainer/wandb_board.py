"""Logging of metrics to Weights & Biases, if `run.wandb` names a project and the package is installed.

It is not a dependency: many clusters have no access to the service, and the run folder holds the same metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from dryvine.trainer.config import Config, ConfigError


def check_wandb(config: Config) -> None:
    """Raise ConfigError if the config uses it and the package is not installed."""
    if config.run.wandb and find_spec("wandb") is None:
        raise ConfigError("run.wandb: the package wandb is not installed; `pip install wandb`, or leave run.wandb out")


class WandbBoard:
    """One W&B run, with the run's name as its id, so that a resumed run continues it."""

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
