"""Weights in 8 bits that are multiplied as such."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dryvine.trainer.generate.open import WeightSource, load, open_weights
from dryvine.trainer.generate.paged import ExpertPages, paged_experts
from dryvine.trainer.generate.requests import Completion, Request
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.generate.score import Passage
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.tensors import int8
from dryvine.trainer.tensors.int8 import FEW, Int8
from tests.support.hand_off import quiet, run_of, small

CPU = torch.device("cpu")
PASSAGES = [Passage((i, 7, 3, *range(20, 50))) for i in range(5)]
REQUESTS = [Request((i, 7, 3), 10, temperature=0.7, seed=i) for i in range(5)]


def rounded(rows_RI: Tensor) -> tuple[Int8, Tensor]:
    """In 8 bits, and what these stand for in FP32."""
    matrix = Int8.empty(*rows_RI.shape)
    half = len(rows_RI) // 2
    matrix.write(half, rows_RI[half:])
    matrix.write(0, rows_RI[:half])
    return matrix, matrix.values[:, : matrix.columns] * matrix.scales.float().unsqueeze(1)


@pytest.mark.parametrize("columns", [1, 7, 32, 40, 96])
@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_products_are_those_of_the_rounded_weights(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    weights = torch.randn(rows, columns) * torch.logspace(-3, 2, rows).unsqueeze(1)
    weights[rows // 2] = 0
    matrix, there = rounded(weights)
    off = (there - weights).abs().amax(1)
    assert (off <= weights.abs().amax(1) * 0.51 / 126).all()
    for count in (0, 1, 3, 4, FEW, FEW + 1, 40):
        x = torch.randn(count, columns)
        size = x.abs() @ there.abs().t()  # of what is summed
        assert ((matrix.product(x) - x @ there.t()).abs() <= 2**-7 * size).all()
        split = torch.cat([part.product(x) for part in matrix.split(1)], 1)
        assert ((split - x @ there.t()).abs() <= 2**-7 * size).all()


def opened(source: WeightSource, dtype: torch.dtype) -> Model:
    return load(source, dtype, CPU, quiet)


def answers(sampler: Sampler) -> list[Completion]:
    return sorted(sampler.generate(REQUESTS), key=lambda completion: completion.request.seed)


def differences(one: Model, other: Model) -> Tensor:
    """Between the log-probabilities of the same tokens."""
    scored = [list(Sampler.alone(model, speculate=True).score(PASSAGES)) for model in (one, other)]
    return torch.cat([(a.logprobs - b.logprobs).abs() for a, b in zip(*scored, strict=True)])


def test_a_model_in_8_bits_is_the_model_of_the_rounded_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(small(mtp_depth=1), tmp_path / "run")
    source = open_weights(str(tmp_path / "run"), mtp=True)
    plain, short = opened(source, torch.float32), opened(source, torch.int8)
    kept = {name for name, weight in short.named_parameters() if weight.int8 is None}
    ends = {name.split(".", 2)[-1].removeprefix("layer.") for name in kept if name.startswith(("layers.", "mtp."))}
    norms = {"attention_norm", "attention.q_norm", "attention.kv_norm", "ffn_norm", "norm", "norm_e", "norm_h"}
    assert ends == {f"{name}.weight" for name in (*norms, "attention.kv_b", "gate")}
    with torch.no_grad():
        held = dict(short.named_parameters())
        for name, weight in plain.named_parameters():
            if (matrix := held[name].int8) is not None:
                weight.copy_((matrix.values[:, : matrix.columns] * matrix.scales.float().unsqueeze(1)).view_as(weight))
    monkeypatch.setattr(int8, "FEW", 0)
    assert differences(plain, short).max() < 1e-5
    monkeypatch.setattr(int8, "FEW", 1 << 20)
    # Rows in BF16; a token whose gate is near a tie goes elsewhere.
    assert 1e-5 < differences(plain, short).median() < 0.02


def test_experts_in_8_bits_are_paged(tmp_path: Path) -> None:
    run_of(small(), tmp_path / "run")
    source = open_weights(str(tmp_path / "run"))
    whole = answers(Sampler.alone(opened(source, torch.int8)))
    expert = 2 * 24 * (32 + 2) + 32 * (32 + 2)  # bytes: rows of 24 numbers take 32, and a scale has two
    pages = ExpertPages(source, torch.int8, 5 * expert)
    model = load(source, torch.int8, CPU, quiet, experts=False)
    paged = answers(Sampler.alone(model, experts=paged_experts(model, pages)))
    for one, other in zip(whole, paged, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert (one.logprobs - other.logprobs).abs().max() < 1e-5
    assert len(pages._pages) == 5
