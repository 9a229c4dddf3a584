"""Fewer experts: what is dropped is what was used least, what is merged computes the same where it can, and the result
is a run like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dryvine.trainer.generate.open import load, open_weights
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.generate.score import Passage
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.pruning.measure import measure
from dryvine.trainer.pruning.prune import aligned, choose, fewer
from tests.support.commands import invoke
from tests.support.hand_off import quiet, run_of, small, weights_of

TEXTS = [Passage(tuple(range(3 * n, 3 * n + 30))) for n in range(9)]
UNGROUPED = {"groups": 1, "group_limit": 1}


def opened(folder: Path) -> Model:
    return load(open_weights(str(folder)), torch.float32, torch.device("cpu"), quiet)


def losses(model: Model) -> torch.Tensor:
    return torch.stack([score.logprobs.sum() for score in Sampler.alone(model).score(TEXTS)])


def prune(tmp_path: Path, *words: str) -> Model:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"def f{n}(x):\n    return x\n"}) + "\n" for n in range(20)))
    made = tmp_path / "-".join(("pruned", *words)).replace("/", "")
    code, said = invoke("prune", str(tmp_path / "run"), "--out", str(made), "--text", str(text), *words)
    assert code == 0
    assert "layers." in said
    return opened(made)


def test_load_is_what_the_gates_chose(tmp_path: Path) -> None:
    run_of(small(), tmp_path / "run")
    uses = measure(opened(tmp_path / "run"), TEXTS)
    s = open_weights(str(tmp_path / "run")).shape
    assert len(uses) == s.layers - s.first_dense
    # Of each text all tokens but the last are read.
    assert {int(use.load.sum()) for use in uses.values()} == {9 * 29 * s.top_k}


def test_all_experts_kept_is_the_same_model_where_there_are_no_groups(tmp_path: Path) -> None:
    run_of(small(**UNGROUPED), tmp_path / "run")
    torch.testing.assert_close(losses(prune(tmp_path, "--keep", "8")), losses(opened(tmp_path / "run")))


def test_experts_that_nobody_chooses_cost_nothing(tmp_path: Path) -> None:
    shape = small(**UNGROUPED)
    state = weights_of(shape)
    for name in [name for name in state if name.endswith(".gate.bias")]:
        state[name][2:4] = -1e6
    run_of(shape, tmp_path / "run", state)
    pruned = prune(tmp_path, "--keep", "6")
    assert pruned.spec.shape.routed == 6
    torch.testing.assert_close(losses(pruned), losses(opened(tmp_path / "run")))


def test_a_copy_with_its_units_in_another_order_is_merged_without_loss(tmp_path: Path) -> None:
    shape = small(**UNGROUPED, top_k=1, normalise=True)
    state = weights_of(shape)
    order = torch.randperm(shape.expert_ffn, generator=torch.Generator().manual_seed(1))
    for name in [name for name in state if name.endswith(".experts.gate_up")]:
        gate, up = state[name][3].chunk(2)
        state[name][5] = torch.cat((gate[order], up[order]))
        down = state[name.replace("gate_up", "down")]
        down[5] = down[3][:, order]
    for name in [name for name in state if name.endswith(".gate.bias")]:
        state[name][:] = torch.tensor([1.0, 1.0, 1.0, 0.2, 1.0, 0.1, 1.0, 1.0]) * 10
    run_of(shape, tmp_path / "run", state)
    model = opened(tmp_path / "run")
    uses = measure(model, TEXTS)
    for use in uses.values():
        assert use.similarity()[5, 3] > 0.999
        use.load[:] = torch.tensor([9, 9, 9, 5, 9, 3, 9, 9])
        choice = choose(use, 7, merge=True)
        assert choice.kept == [0, 1, 2, 3, 4, 6, 7]
        assert choice.into == {5: 3}
    units = torch.randn(24, 9, generator=torch.Generator().manual_seed(2))
    assert torch.equal(aligned(units[torch.randperm(24)], units), units)


def test_merging_another_expert_changes_the_one_that_stays(tmp_path: Path) -> None:
    run_of(small(), tmp_path / "run")
    dropped, merged = (dict(prune(tmp_path, "--keep", "4", *more).named_parameters()) for more in ((), ("--merge",)))
    changed = {name for name in dropped if not torch.equal(dropped[name], merged[name])}
    assert changed == {name for name in dropped if ".experts." in name}


@pytest.mark.parametrize(("keep", "why"), [(2, "a number from 3, which a token chooses, to 8"), (9, "to 8")])
def test_a_number_that_no_model_can_have_is_refused(keep: int, why: str) -> None:
    with pytest.raises(HandOffError, match=why):
        fewer(small(), keep)
