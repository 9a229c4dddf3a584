"""Decoding in BF16 and FP8, and on a GPU: about as far from FP32 as the training forward of the same arithmetic is, and
in FP32 no further than 1e-5 from it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dryvine.comm.dispatch.single_rank import SingleRank
from dryvine.trainer.fp8.engines.names import make_engine
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.fp8.recipe import preset
from dryvine.trainer.generate.requests import Completion, Request
from dryvine.trainer.generate.sampler import Room, Sampler
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.shape import Shape, blocks
from dryvine.trainer.model.spec import Spec
from tests.support.generate import largest_difference, said_of, training_forward
from tests.support.model import tiny

ENGINE = {"cpu": "emulate", "cuda": "triton"}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])


def shape() -> Shape:
    """Widths that FP8 and the GPU's kernels take."""
    return tiny(
        hidden=256, ffn=256, expert_ffn=128, q_lora=128, kv_lora=64, nope_dim=64, rope_dim=32, v_dim=64, vocab=128,
        init_std=0.06, mtp_depth=1,
    )  # fmt: skip


def model_of(device: str, arithmetic: str) -> Model:
    """The same weights, rounded to BF16, in every arithmetic."""
    fp8 = FP8(preset("deepseek_v3"), make_engine(ENGINE[device]), "") if arithmetic == "fp8" else None
    dtype = torch.float32 if arithmetic == "fp32" else torch.bfloat16
    facts, names = shape(), tuple(block.name for block in blocks(shape()))
    rounded = Model(Spec(facts, torch.bfloat16, "cpu"), {0: names}, SingleRank(facts.routed))
    rounded.initialise(0)
    model = Model(Spec(facts, dtype, device, fp8=fp8), {0: names}, SingleRank(facts.routed))
    model.load({name: weight.detach() for name, weight in rounded.named_parameters()} | rounded.buffers)
    return model


def completions(model: Model, slots: int, speculate: bool = False) -> list[Completion]:
    """Of different lengths, which leave and join."""
    rng = random.Random(0)
    requests = [
        Request(tuple(rng.randrange(128) for _ in range(rng.randint(1, 12))), rng.randint(1, 16), seed=i, group=i % 3)
        for i in range(12)
    ]
    return list(Sampler.alone(model, Room(slots), speculate=speculate).generate(requests))


@GPU
@pytest.mark.parametrize("slots", [1, 5, 64])
def test_fp32_on_a_gpu_is_the_training_forward(slots: int) -> None:
    model = model_of("cuda", "fp32")
    assert max(largest_difference(model, completion) for completion in completions(model, slots)) < 1e-5


def _mean_of_most(far_N: Tensor) -> float:
    """Without the largest 2%: a token whose gate is at a tie goes to another expert, and is 50 times as far off as the
    others."""
    return float(far_N.sort().values[: int(0.98 * len(far_N))].mean())


@devices
@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("arithmetic", ["bf16", "fp8"])
def test_rounding_takes_decoding_and_training_about_as_far_from_fp32(
    device: str, arithmetic: str, speculate: bool
) -> None:
    exact, model = model_of(device, "fp32"), model_of(device, arithmetic)
    decoded, trained, apart = [], [], []
    for completion in completions(model, 5, speculate):
        assert (completion.drafted > 0) == (speculate and len(completion.tokens) > 1)
        tokens = [*completion.request.prompt, *completion.tokens.tolist()][:-1]
        true, ours = (said_of(training_forward(one, tokens)[0], completion) for one in (exact, model))
        decoded.append((completion.logprobs - true).abs())
        trained.append((ours - true).abs())
        apart.append((completion.logprobs - ours).abs())
    far = [_mean_of_most(torch.cat(some)) for some in (decoded, trained, apart)]
    # Absorbed, queries and sums of latents are rounded once more than in training.
    assert far[0] < 2 * far[1]
    assert far[2] < 2 * far[1]
