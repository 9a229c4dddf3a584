"""Training over `nvlink` is training in one process, its bytes the planned ones. CPU memory stands in for GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from dryvine.comm import local
from dryvine.comm.dispatch import copy_exchange, nvlink
from dryvine.launch.plan.hardware import load_hardware
from dryvine.launch.plan.memory import staging
from dryvine.launch.plan.plan import make
from dryvine.trainer import verify
from dryvine.trainer.config import Config
from dryvine.trainer.deviations import deviations
from dryvine.trainer.run_plan import RunPlan, make_plan
from tests.support.host_links import open_host_links
from tests.support.live import RankBytes, measure

Tiny = Callable[..., Config]
LAYOUTS = [(1, 2, "one_f_one_b"), (2, 2, "dualpipe")]
TWO_NODES = ("parallel.ep=4", "comm.topology.nodes=[2,2]", "batch.sequences=8")


@contextmanager
def shared(folder: Path) -> Iterator[None]:
    """CPU memory in place of GPUs'."""
    links = partial(open_host_links, folder)
    with mock.patch.object(nvlink, "open_links", links), mock.patch.object(copy_exchange, "open_links", links):
        yield


def trained(rank: int, folder: Path, plan: RunPlan) -> verify.RankRun:
    with shared(folder):
        return verify._rank(rank, plan, 2, "cpu")


def measured(rank: int, folder: Path, config: Config) -> RankBytes:
    with shared(folder):
        return measure(rank, config)


@pytest.mark.parametrize(("pp", "ep", "schedule"), LAYOUTS)
def test_it_trains_like_one_process(tinier: Tiny, tmp_path: Path, pp: int, ep: int, schedule: str) -> None:
    config = tinier(f"parallel.pp={pp}", f"parallel.ep={ep}", f"parallel.schedule={schedule}", "comm.dispatcher=nvlink")

    def started(plan: RunPlan, steps: int, device: str) -> list[verify.RankRun]:
        return local.run(trained, plan.config.parallel.world, tmp_path, plan)

    alone = verify.play(verify.alone(config), steps=2)
    with mock.patch.object(verify, "_started", started):
        found = deviations(alone, verify.play(config, steps=2))
    assert len(list(tmp_path.glob("tmp*"))) == pp, "an expert-parallel group shared no memory"
    assert not [d for d in found if not d.fine]


def test_sums_by_choice_train_to_the_bits_of_flat(tinier: Tiny, tmp_path: Path) -> None:
    """With four addends a token, whose order shows: by rank there are other bits."""
    wide = ("parallel.ep=2", "model.routed=8", "model.top_k=4", "model.groups=1", "model.group_limit=1")

    def weights(words: str) -> dict[str, np.ndarray]:
        plan = make_plan(tinier(*wide, *words.split()))
        with mock.patch.object(verify, "_started", return_value=local.run(trained, 2, tmp_path, plan)):
            return dict(verify.play(plan.config, steps=2).weights)

    flat, by_choice, by_rank = (
        weights(f"comm.dispatcher={words}") for words in ("flat", "nvlink comm.sums=by_choice", "nvlink")
    )
    assert all(np.array_equal(by_choice[name], value) for name, value in flat.items())
    assert not all(np.array_equal(by_rank[name], value) for name, value in flat.items())


@pytest.mark.long
def test_as_hop_2_it_trains_to_the_bits_of_two_hops(tinier: Tiny, tmp_path: Path) -> None:
    def started(plan: RunPlan, steps: int, device: str) -> list[verify.RankRun]:
        return local.run(trained, plan.config.parallel.world, tmp_path, plan)

    alone = verify.play(verify.alone(tinier(*TWO_NODES)), steps=2)
    with mock.patch.object(verify, "_started", started):
        ours, plain = (
            verify.play(tinier(*TWO_NODES, f"comm.dispatcher={name}"), steps=2) for name in ("nvlink", "hierarchical")
        )
    assert len(list(tmp_path.glob("tmp*"))) == 2, "the ranks of a node shared no memory"
    assert all(np.array_equal(ours.weights[name], value) for name, value in plain.weights.items())
    assert not [d for d in deviations(alone, ours) if not d.fine]


@pytest.mark.long
def test_its_bytes_as_hop_2_are_those_of_two_hops(tinier: Tiny, tmp_path: Path) -> None:
    """Between nodes and inside them."""
    ours, plain = (
        local.run(measured, 4, tmp_path, tinier(*TWO_NODES, f"comm.dispatcher={name}"))
        for name in ("nvlink", "hierarchical")
    )
    assert [rank.sent for rank in ours] == [rank.sent for rank in plain]
    assert all(rank.sent["inter"] and rank.sent["intra"] for rank in ours)


def test_as_hop_2_its_bytes_and_rings_are_planned(tinier: Tiny) -> None:
    ours, plain = (
        make(make_plan(tinier(*TWO_NODES, f"comm.dispatcher={name}")), load_hardware("cpu"))
        for name in ("nvlink", "hierarchical")
    )
    assert ours.dispatch_bytes_of(0) == plain.dispatch_bytes_of(0)
    assert not ours.sent.recorded
    # 2 ranks x 4 slots, each for the rows of a microbatch: 16 tokens x 32 x 4 bytes and two values for each choice.
    config = tinier(*TWO_NODES)
    tokens, top_k = config.parallel.microbatch_sequences * config.data.seq_len, config.model.top_k
    rings = staging(ours.sent) - staging(plain.sent)
    least = 2 * 4 * tokens * (4 * config.model.hidden + 8 * top_k)
    assert least <= rings <= 1.5 * least + 4096


@pytest.mark.parametrize("sums", ["by_rank", "by_choice"])
def test_its_bytes_are_planned(tinier: Tiny, tmp_path: Path, sums: str) -> None:
    config = tinier("parallel.ep=2", "comm.dispatcher=nvlink", f"comm.sums={sums}")
    plan = make(make_plan(config), load_hardware("cpu"))
    for found in local.run(measured, 2, tmp_path, config):
        assert found.sent == {link: size for link, size in plan.dispatch_bytes_of(0).items() if size}
