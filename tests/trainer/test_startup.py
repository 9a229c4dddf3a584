"""The lines that a run begins with."""

from __future__ import annotations

from collections.abc import Callable

from dryvine.comm import local
from dryvine.comm.topology import by_sizes
from dryvine.trainer.config import Config
from dryvine.trainer.rig import row_bytes
from dryvine.trainer.startup import startup_lines
from tests.support.rig import rig_of

Tiny = Callable[..., Config]


def _lines(rank: int, config: Config, sizes: list[int], steps_done: int) -> list[str]:
    return list(startup_lines(rig_of(config), by_sizes(sizes), steps_done))


def test_one_process_has_little_to_say(tiny: Tiny) -> None:
    config = tiny()
    lines = _lines(0, config, [1], 0)
    assert lines[0] == "comm.dispatcher: auto takes flat: one expert-parallel rank: nothing travels"
    assert lines[1].startswith("activations kept for backwards: at most ")
    assert len(lines) == 2
    assert _lines(0, config, [1], 4)[2] == f"resuming {config.run.folder} after step 4"
    assert not [line for line in startup_lines(rig_of(config), None, 0) if "comm.dispatcher" in line]


def test_the_expert_group_of_rank_0_is_meant_and_not_the_world(tiny: Tiny) -> None:
    """Two data ranks on two nodes, each with all experts: nothing travels between them."""
    (lines, _) = local.run(_lines, 2, tiny("parallel.dp=2"), [1, 1], 0, deadline=100)
    assert lines[0] == "comm.dispatcher: auto takes flat: one expert-parallel rank: nothing travels"


def test_groups_that_straddle_nodes_are_a_warning_with_the_bytes_of_a_dispatched_row(tiny: Tiny) -> None:
    """Three nodes of one rank hold two experts each; two groups of three straddle them."""
    config = tiny("parallel.ep=3", "model.routed=6", "comm.dispatcher=flat", "batch.sequences=15")
    lines = local.run(_lines, 3, config, [1, 1, 1], 0, deadline=100)[0]
    assert lines[0] == "comm.dispatcher: flat, as asked"
    assert lines[1].startswith("warning: routing groups do not fit nodes: 2 groups of 3 experts over 3 nodes")
    assert "may reach 2 nodes instead of 1" in lines[1]
    assert f"up to {row_bytes(config)[0]} bytes more a token and layer" in lines[1]


def test_a_row_has_its_weights_with_it(tiny: Tiny) -> None:
    """32 numbers and two FP32 weights; with FP8, a byte per number and an FP32 scale per 128 of them."""
    assert row_bytes(tiny("run.dtype=fp32")) == (32 * 4 + 2 * 4, 32 * 4 + 2 * 4)
    assert row_bytes(tiny("run.dtype=bf16")) == (32 * 2 + 2 * 4, 32 * 2 + 2 * 4)
    dispatched, combined = row_bytes(tiny("run.dtype=bf16", "fp8.preset=deepseek_v3"))
    assert dispatched < combined == 32 * 2 + 2 * 4
