"""Starts the ranks of a planned run on this machine: common to `train`, `sft` and `rl`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from dryvine.launch import data_cli

if TYPE_CHECKING:
    from dryvine.trainer.run_plan import RunPlan


def start(planned: RunPlan, words: Sequence[str], max_restarts: int) -> int:
    """Build the data if need be, and train: in this process if the layout has one rank and is not to be started again,
    else in one process per rank. `words` are the config and its overrides. Returns an exit code."""
    from dryvine.trainer.data.prepare import prepare
    from dryvine.trainer.fits import check_host

    config = planned.config
    check_host(config, config.run.device)
    with data_cli.progress_bar(Console(stderr=True)) as on_progress:
        for source in () if config.sft or config.rl else config.data.sources:
            prepare(config.data, source, on_progress)
    world = config.parallel.world
    if world == 1 and not max_restarts:
        from dryvine.trainer.__main__ import main as rank_main

        return rank_main(words)
    from dryvine.launch.spawn import Launch, spawn

    return spawn(Launch(world, words, config.comm.deadline), max_restarts)
