"""Experts read on demand: the same tokens, in no more buffers than the cap allows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dryvine.trainer.generate.open import load, open_weights
from dryvine.trainer.generate.paged import ExpertPages, paged_experts
from dryvine.trainer.generate.requests import Completion, Request
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.hand_off.encodings import Encoding
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.export_hf import export_hf
from tests.support.hand_off import quiet, run_of, small, tokenizer_of

EXPERT = 3 * 24 * 32 * 4  # bytes of one of `small`'s, in FP32
CPU = torch.device("cpu")
REQUESTS = [Request((i, 7, 3), 10, seed=i) for i in range(5)]


def answers(sampler: Sampler) -> list[Completion]:
    return sorted(sampler.generate(REQUESTS), key=lambda completion: completion.request.seed)


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("buffers", [2, 5, 1000])
def test_paged_experts_give_the_same_tokens_within_the_cap(tmp_path: Path, buffers: int, exported: bool) -> None:
    run = run_of(small(), tmp_path / "run")
    export_hf(run, tmp_path / "out", Encoding("fp32"), tokenizer_of(run), quiet, 1 << 30)
    source = open_weights(str(tmp_path / ("out" if exported else "run")))
    plain = answers(Sampler.alone(load(source, torch.float32, CPU, quiet)))
    pages = ExpertPages(source, torch.float32, buffers * EXPERT + EXPERT // 2)
    model = load(source, torch.float32, CPU, quiet, experts=False)
    experts = [weight for _, weight in model.named_parameters() if weight.expert]
    assert {weight.device.type for weight in experts} == {"meta"}
    paged = answers(Sampler.alone(model, experts=paged_experts(model, pages)))
    for one, other in zip(plain, paged, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.routes, other.routes)
        assert (one.logprobs - other.logprobs).abs().max() < 1e-5
    held = {page.result().down.values.data_ptr() for page in pages._pages.values()}
    assert len(held) == min(buffers, 16)  # two mixtures of eight
    f = pages.figures
    assert f.bytes_read >= f.misses * EXPERT > 0
    # What fits is read once.
    assert (f.bytes_read == 16 * EXPERT) == (buffers == 1000)


def test_mtp_speculates_with_paged_experts(tmp_path: Path) -> None:
    run_of(small(mtp_depth=1), tmp_path / "run")
    source = open_weights(str(tmp_path / "run"), mtp=True)
    plain = answers(Sampler.alone(load(source, torch.float32, CPU, quiet)))
    pages = ExpertPages(source, torch.float32, 1000 * EXPERT)
    model = load(source, torch.float32, CPU, quiet, experts=False)
    paged = answers(Sampler.alone(model, experts=paged_experts(model, pages), speculate=True))
    assert [one.tokens.tolist() for one in plain] == [one.tokens.tolist() for one in paged]
    assert sum(one.drafted for one in paged) > 0
    assert pages.figures.bytes_read == 24 * EXPERT  # two mixtures of eight, and MTP's


def test_a_cap_for_less_than_two_experts_is_refused_with_what_it_takes(tmp_path: Path) -> None:
    run_of(small(), tmp_path / "run")
    with pytest.raises(HandOffError, match=f"give {2 * EXPERT:,}"):
        ExpertPages(open_weights(str(tmp_path / "run")), torch.float32, EXPERT)


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    run = run_of(small(), tmp_path / "run")
    export_hf(run, tmp_path / "out", Encoding("fp32"), tokenizer_of(run), quiet, 1 << 30)
    source = open_weights(str(tmp_path / "out"))
    model = load(source, torch.float32, CPU, quiet, experts=False)
    sampler = Sampler.alone(model, experts=paged_experts(model, ExpertPages(source, torch.float32, 4 * EXPERT)))
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(HandOffError, match="cut short"):
        list(sampler.generate(REQUESTS))
