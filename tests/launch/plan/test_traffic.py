"""Bytes on links: two hops against what the `fake` dispatcher counts of random choices, gradients by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dryvine.comm.dispatch.fake import Fake
from dryvine.comm.topology import by_sizes
from dryvine.launch.plan.hardware import load_hardware
from dryvine.launch.plan.plan import make
from dryvine.launch.plan.traffic import Counter, dispatching, reached, row_bytes, send_seconds
from dryvine.trainer.config import Config
from dryvine.trainer.run_plan import make_plan

WIDE = ("model.routed=32", "model.groups=8", "model.group_limit=4", "model.top_k=4", "parallel.ep=16")


def random_choices(config: Config, tokens: int) -> torch.Tensor:
    """Of each token: its best groups at random, and in them experts at random."""
    s = config.model
    torch.manual_seed(0)
    groups = torch.rand(tokens, s.groups).argsort(1)[:, : s.group_limit]
    score = torch.rand(tokens, s.groups, s.routed // s.groups)
    kept = torch.zeros(tokens, s.groups, 1).scatter_(1, groups[..., None], 1.0)
    return (score * kept).flatten(1).topk(s.top_k).indices


@pytest.mark.parametrize("nodes", [(4, 4, 4, 4), (8, 8), (2,) * 8])
def test_two_hops_send_what_random_choices_send(tiny: Callable[..., Config], nodes: tuple[int, ...]) -> None:
    config, tokens = tiny(*WIDE, "data.seq_len=32"), 20_000
    topology = by_sizes(nodes)
    fake = Fake(topology, 0, config.model.routed)
    handle = fake.plan_routing(random_choices(config, tokens)).wait()
    rows = torch.zeros(tokens, config.model.hidden)
    fake.dispatch((rows,), torch.zeros(tokens, config.model.top_k), handle).wait()
    sent, planned = fake.meter.take(), dispatching(config, topology, cuda=False).dispatch
    for link in ("intra", "inter"):
        each = sent[link] / tokens  # type: ignore[literal-required]
        assert planned[link] / 32 == pytest.approx(each, rel=0.02), link  # type: ignore[index]


def test_nodes_of_the_config_have_the_links_of_the_machine(tiny: Callable[..., Config]) -> None:
    """So `auto` takes the same as on the machine: copies inside nodes of two GPUs, whose rings are planned."""
    pairs, fours = (
        make(make_plan(tiny("parallel.ep=4", f"comm.topology.nodes={nodes}", "run.device=cuda")), load_hardware("h100"))
        for nodes in ("[2,2]", "[4]")
    )
    assert (pairs.sent.name, fours.sent.name) == ("nvlink", "flat")
    assert pairs.sent.rings > 0
    assert fours.sent.rings == 0


def test_a_token_reaches_what_its_groups_allow(tiny: Callable[..., Config]) -> None:
    config = tiny("model.routed=8", "model.groups=4", "model.group_limit=2", "model.top_k=4")
    assert reached(config, 1) == 1
    # Both experts of both of its groups: half of the experts.
    assert reached(config, 1 / 4) == pytest.approx(1 / 2)
    assert reached(config, 1 / 8) == pytest.approx(1 / 2)


def test_rows_of_fp8_have_a_byte_a_tile(tiny: Callable[..., Config]) -> None:
    """V3: 7168 + 56 + weights of 8 choices, against twice 7168."""
    config = tiny("run.dtype=bf16", "model.hidden=7168")
    fp8 = tiny("run.dtype=bf16", "model.hidden=7168", 'fp8.preset="deepseek_v3"')
    assert row_bytes(config, 8) == (14336 + 32, 14336, 14336, 14336 + 32)
    assert row_bytes(fp8, 8) == (7168 + 56 + 32, 14336, 7168 + 56, 14336 + 32)


def test_the_slower_link_takes_the_time() -> None:
    machine = load_hardware("h800")
    assert send_seconds(Counter(), machine) == 0
    sent = Counter({"intra": int(160e9), "inter": int(20e9)})
    assert send_seconds(sent, machine) == pytest.approx(1.0, rel=1e-3)
    assert send_seconds(Counter({"intra": int(16e9), "inter": int(80e9)}), machine) == pytest.approx(2.0, rel=1e-3)


def test_gradients_cross_nodes_once_for_a_node(tiny: Callable[..., Config]) -> None:
    """Two data ranks in one node: half of the FP32 sums and of the FP32 weights leave a rank."""
    plan = make(make_plan(tiny("parallel.dp=2")), load_hardware("cpu"))
    sums = plan.ranks[0].kinds["gradient sums"]
    assert plan.sharding.bytes == {"intra": sums, "inter": 0}


@pytest.mark.parametrize(
    ("nodes", "crossing"),
    [
        ("[4]", 0),
        # Half of the sums crosses, and of it each of two ranks its half; the other two copies are on the other node.
        ("[2,2]", 1 / 4),
        ("[1,1,1,1]", 3 / 4),
    ],
)
def test_gradients_cross_between_the_nodes_that_the_config_names(
    tiny: Callable[..., Config], nodes: str, crossing: float
) -> None:
    plan = make(make_plan(tiny("parallel.dp=4", f"comm.topology.nodes={nodes}")), load_hardware("cpu"))
    sums = plan.ranks[0].kinds["gradient sums"]
    assert plan.sharding.bytes["inter"] == pytest.approx(2 * crossing * sums, rel=1e-4)  # and as much of new weights
