"""Benchmarks of steps for GPUs, without a GPU: as far as the ranks that they start, and what they make of theirs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import host, planner_gpu, step_variants, two_gpus
from benchmarks.overlap import graphed
from benchmarks.support import gpu_jobs
from benchmarks.support.corpus import corpus_folder
from dryvine.comm import local
from dryvine.trainer.config import Config


@pytest.fixture
def no_ranks(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs of which ranks would have been started; each start fails, but of `host` and `graphed`."""
    configs: list[Config] = []

    def run(fn: Callable[..., Any], world: int, *args: Any, deadline: float, device: str) -> list[Any]:
        config = getattr(args[0], "config", args[0])
        assert world == config.parallel.world
        configs.append(config)
        made = {
            host.measure: host.Measured(
                1.0, 1.0, 0.0, 1.0, 1, 1, 1, 1, 1, 1, 1.0, 1.0, 1, f"bits {config.parallel.graphs}", {}, "H100"
            ),
            graphed.measure: {way: [1.0] for way in graphed.WAYS},
        }
        if fn not in made:
            raise local.RankFailed("none was started")
        return [made[fn]] * world

    monkeypatch.setattr(local, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    for module in (host, graphed, planner_gpu):
        monkeypatch.setattr(module, "corpus", lambda out, vocab: corpus)
    for module in (two_gpus, step_variants):
        monkeypatch.setattr(module, "corpus", lambda *_: corpus)
    return configs


@pytest.mark.parametrize(
    ("name", "starts"),
    [("host", 4), ("host, ep 2", 2), ("host, ep 4", 2), ("overlap with graphs", 2), ("planner, one GPU", 4),
     ("planner, two GPUs", 5), ("step variants", 3), ("offload", 2), ("pipelines", 5), ("experts", 14)],
)  # fmt: skip
def test_every_benchmark_of_steps_gets_as_far_as_its_ranks(
    name: str, starts: int, tmp_path: Path, no_ranks: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = (job for part in gpu_jobs.PARTS.values() for job in part(tmp_path) if job.name == name)
    module, words = job.words[1], job.words[2:]
    monkeypatch.setattr(sys, "argv", [module, *words])
    importlib.import_module(module).main()
    assert len(no_ranks) == starts
    assert {config.parallel.world for config in no_ranks} <= {1, job.gpus}
    assert all(config.run.device == "cuda" for config in no_ranks)


@pytest.mark.parametrize(("layout", "graphs"), [((), 6), (("parallel.ep=2", "comm.dispatcher=flat"), 0)])
def test_plans_are_compared_with_seconds_of_graphs_and_memory_without(
    layout: tuple[str, ...], graphs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(fn: Any, world: int, config: Config, **_: Any) -> list[Any]:
        if fn is planner_gpu.profile:
            return [None]
        auto = config.parallel.graphs == "auto"
        size, seconds, count = (0, 0.5, 6) if auto else (30, 1.0, 0)
        return [planner_gpu.RankFound({}, {}, 0, size, seconds, seconds, count)] * world

    monkeypatch.setattr(local, "run", run)
    model = (*planner_gpu.WIDE, *planner_gpu.ALONE, f"data.source={corpus_folder(tmp_path, 320)}")
    row = planner_gpu.compare({}, model, layout, 1e9)
    assert row.plan.config.parallel.graphs == "off"
    assert row.plan.ranks[0].kinds["CUDA graphs"] == 0
    assert {found.peak for found in row.ranks} == {30}
    assert planner_gpu.slowest(row.usual) == (0.5 if graphs else 1.0)
    assert {found.graphs for found in row.usual} == {graphs}
