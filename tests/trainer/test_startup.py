"""The lines that a run begins with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dryvine.comm.topology import by_sizes
from dryvine.trainer.config import Config, load
from dryvine.trainer.data.splits import open_data
from dryvine.trainer.rig import row_bytes
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.startup import preset_line, startup_lines

Tiny = Callable[..., Config]
FP8 = ("run.dtype=bf16", "fp8.preset=deepseek_v3")


def lines(config: Config, sizes: list[int] | None, steps_done: int = 0) -> list[str]:
    """On nodes of so many ranks. What they say needs no rank to be started."""
    p = config.parallel
    mesh = SimpleNamespace(pp=p.pp, ep=p.ep, size=p.world, device=torch.device("cpu"))
    data = open_data(config)
    optimizer = SimpleNamespace(chosen="")
    rig: Any = SimpleNamespace(
        config=config, plan=make_plan(config), mesh=mesh, data=data, carrier="gloo", fp8=None, optimizer=optimizer
    )
    return list(startup_lines(rig, None if sizes is None else by_sizes(sizes), steps_done))


def test_one_process_has_little_to_say(tiny: Tiny) -> None:
    config = tiny()
    said = lines(config, [1])
    assert said[0] == "comm.dispatcher: auto takes flat: one expert-parallel rank: nothing travels"
    assert said[1].startswith("activations kept for backwards: at most ")
    assert len(said) == 2
    assert lines(config, [1], 4)[2] == f"resuming {config.run.folder} after step 4"
    assert lines(config, [1], 6)[2].endswith("after step 6, and run.steps = 6: nothing is left")
    assert len(lines(config, None)) == 1


def test_a_run_of_rl_says_where_it_is_not_its_preset() -> None:
    """The rate of a file comes before the preset's, though the file may have inherited it from pretraining."""
    folder = Path(__file__).resolve().parents[2] / "configs"
    assert preset_line(load(folder / "countdown_r1zero.toml", ("rl.preset=cispo",))) == "rl.preset cispo"
    said = preset_line(load(folder / "countdown_r1zero.toml", ("rl.preset=dr_grpo", "rl.loss.aggregate=token_mean")))
    keys = (
        "optim.lr = 0.0002 (1e-06), rl.loss.aggregate = token_mean (token_sum), rl.samples = 16 (8), rl.max_tokens = 48"
    )
    assert said == f"rl.preset dr_grpo, but for {keys} (3000)"


def test_a_pipeline_names_what_carries_its_messages(tiny: Tiny) -> None:
    assert lines(tiny("parallel.pp=2"), [2])[1] == "pipeline messages: gloo"


def test_the_expert_group_of_rank_0_is_meant_and_not_the_world(tiny: Tiny) -> None:
    """Two data ranks on two nodes, each with all experts: nothing travels between them."""
    assert lines(tiny("parallel.dp=2"), [1, 1])[0].endswith("one expert-parallel rank: nothing travels")


def test_groups_that_straddle_nodes_are_a_warning_with_the_bytes_of_a_dispatched_row(tiny: Tiny) -> None:
    """Three nodes of one rank hold two experts each; two groups of three straddle them. The rows that are combined
    are larger: they are not FP8."""
    config = tiny("parallel.ep=3", "model.routed=6", "comm.dispatcher=flat", "batch.sequences=15", *FP8)
    chosen, warning, *_ = lines(config, [1, 1, 1])
    assert chosen == "comm.dispatcher: flat, as asked"
    assert warning.startswith("warning: routing groups do not fit nodes: 2 groups of 3 experts over 3 nodes")
    assert "may reach 2 nodes instead of 1" in warning
    assert f"up to {row_bytes(config)[0]} bytes more a token and layer" in warning


def test_a_row_has_its_weights_with_it(tiny: Tiny) -> None:
    """32 numbers and two FP32 weights; with FP8, a byte per number and an FP32 scale per 128 of them, each from a
    word on."""
    assert row_bytes(tiny("run.dtype=fp32")) == (32 * 4 + 2 * 4, 32 * 4 + 2 * 4)
    assert row_bytes(tiny("run.dtype=bf16")) == (32 * 2 + 2 * 4, 32 * 2 + 2 * 4)
    assert row_bytes(tiny(*FP8)) == (32 + 8 + 2 * 4, 32 * 2 + 2 * 4)
