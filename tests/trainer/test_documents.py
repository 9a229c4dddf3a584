"""Packed documents train as if each were alone: attention, positions, losses, gradients, recompute, MTP, layouts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dryvine.parallel.stage import Flight
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.documents import ALONE, Documents, documents_of
from dryvine.trainer.model.layer import Layer
from dryvine.trainer.model.shape import Shape, Yarn
from tests.support.documents import LENGTHS, plain_documents
from tests.support.model import filled, run_backward, run_forward, tiny, whole


def test_positions_restart_and_targets_stay_inside() -> None:
    found = plain_documents((2, 3), (5,), depth=1)
    assert found.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3, 4]
    assert found.bounds.tolist() == [0, 2, 5, 10]
    assert (found.lengths, found.longest) == ((2, 3, 5), 5)
    next_one, one_further = (weights.tolist() for weights in found.weights)
    assert next_one == [1, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    assert one_further == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("recompute", [(), ("norm", "mla_up", "swiglu")])
@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora": None}, {"yarn": Yarn(factor=4, original=8)}, {"v_dim": 16}],
    ids=["V3", "V2", "YaRN", "v"],
)
def test_attention_is_that_of_one_document_at_a_time(changes: dict[str, object], recompute: tuple[str, ...]) -> None:
    model = filled(tiny(recompute=recompute, **changes))
    layer = model.root["layers"]["0"]
    assert isinstance(layer, Layer)
    x = torch.randn(4 * 24, 32, generator=torch.Generator().manual_seed(0))
    documents = plain_documents(*LENGTHS)
    packed = x.clone().requires_grad_()
    out = layer.attend(packed, 4, documents)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(seed)
    grads = {name: w.gradient().clone() for name, w in layer.attention.named_parameters()}
    for weight in layer.attention.parameters():
        weight.gradient().zero_()
    at = 0
    for length in documents.lengths:
        alone = x[at : at + length].clone().requires_grad_()
        expected = layer.attend(alone, 1, None)
        torch.testing.assert_close(out[at : at + length], expected, rtol=1e-5, atol=1e-5)
        expected.backward(seed[at : at + length])
        torch.testing.assert_close(packed.grad[at : at + length], alone.grad, rtol=1e-5, atol=1e-5)
        at += length
    for name, weight in layer.attention.named_parameters():
        torch.testing.assert_close(grads[name], weight.gradient(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize("v_dim", [64, 40])
def test_on_a_gpu_attention_is_that_of_one_document_at_a_time(v_dim: int, dtype: torch.dtype, bound: float) -> None:
    wide = tiny(hidden=128, heads=4, q_lora=64, kv_lora=64, nope_dim=32, rope_dim=16, v_dim=v_dim)
    layer = model_on_gpu(wide, dtype).root["layers"]["0"]
    assert isinstance(layer, Layer)
    x = torch.randn(4 * 24, 128, device="cuda").to(dtype)
    documents = plain_documents(*LENGTHS, device="cuda")
    packed, seed = x.clone().requires_grad_(), torch.randn(4 * 24, 128, device="cuda").to(dtype)
    out = layer.attend(packed, 4, documents)
    out.backward(seed)
    found = []
    for rows, by in zip(x.split(documents.lengths), seed.split(documents.lengths), strict=True):
        alone = rows.clone().requires_grad_()
        expected = layer.attend(alone, 1, None)
        expected.backward(by)
        found.append((expected.detach(), alone.grad))
    for ours, theirs in zip((out.detach(), packed.grad), map(torch.cat, zip(*found, strict=True)), strict=True):
        assert ours is not None
        assert (ours - theirs).norm() < bound * theirs.norm()


def model_on_gpu(shape: Shape, dtype: torch.dtype) -> Model:
    source, model = filled(shape), whole(shape, dtype=dtype, device="cuda")
    model.load({name: weight.detach() for name, weight in source.named_parameters()} | source.buffers)
    return model


def test_recompute_changes_no_bit() -> None:
    found = []
    for recompute in ((), ("norm", "mla_up", "swiglu"), ("layer",)):
        model = filled(tiny(recompute=recompute, mtp_depth=1))
        found.append(train(model, tokens_of(model.spec.shape), plain_documents(*LENGTHS, depth=1)))
    plain, grads = found[0]
    for again, same in found[1:]:
        assert all(torch.equal(plain[name], again[name]) for name in plain)
        assert all(torch.equal(grads[name], same[name]) for name in grads)


def tokens_of(shape: Shape) -> Tensor:
    return torch.randint(shape.vocab, (4, 25 + shape.mtp_depth), generator=torch.Generator().manual_seed(2))


def train(model: Model, tokens: Tensor, documents: Documents | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses, and gradients by parameter, of one microbatch."""
    for _, weight in model.named_parameters():
        weight.gradient().zero_()
    flight = Flight(tokens, 1.0, documents=documents)
    losses = run_forward([model.stages[0]], [flight])
    for closures in run_backward([model.stages[0]], [flight]):
        for closure in closures:
            closure()
    return losses, {name: weight.gradient().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", ["loss", "mtp.0"])
def test_a_whole_model_has_the_losses_and_gradients_of_its_documents(name: str) -> None:
    """Each document through the model alone: main loss of all its next tokens, MTP's of those one further."""
    ahead = 1 if name == "loss" else 2
    model = filled(tiny(mtp_depth=1, balance_alpha=0.0, mtp_weight=1.0))
    tokens, documents = tokens_of(model.spec.shape), plain_documents(*LENGTHS, depth=1)
    only = [weights * (i == ahead - 1) for i, weights in enumerate(documents.weights)]
    losses, grads = train(model, tokens, replace(documents, weights=tuple(only)))
    line, n = tokens[:, :24].flatten(), documents.positions.numel()
    total, summed, at = 0.0, {key: torch.zeros_like(g) for key, g in grads.items()}, 0
    for length in documents.lengths:
        # A last document goes on behind the window, for whose tokens there are targets.
        end_of_row = tokens[at // 24, 24:] if (at + length) % 24 == 0 else tokens[0, :0]
        text = torch.cat([line[at : at + length], end_of_row])
        inputs = min(length, len(text) - ahead)
        if inputs > 0:
            alone = torch.cat([text, torch.zeros(2, dtype=torch.int64)])[: inputs + 2].unsqueeze(0)
            one = documents_of(
                np.zeros(alone.shape, np.int64),
                [np.full((1, inputs), w, np.float32) for w in (ahead == 1, ahead == 2)],
                "cpu",
            )
            found, more = train(model, alone, one)
            total += float(found[name]) * inputs
            summed = {key: summed[key] + more[key] * inputs for key in summed}
        at += length
    assert float(losses[name]) == pytest.approx(total / n, rel=1e-5)
    for key, gradient in grads.items():
        torch.testing.assert_close(gradient, summed[key] / n, rtol=1e-4, atol=1e-6, msg=key)


def test_one_document_that_fills_the_sequence_is_what_no_mask_is() -> None:
    shape = tiny(mtp_depth=1)
    masked, plain = filled(shape), filled(shape)
    tokens = tokens_of(shape)
    one, grads = train(masked, tokens, plain_documents(*[(24,)] * 4, depth=1))
    other, expected = train(plain, tokens, None)
    for name in other:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-7)
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("device", "dtype", "bound"),
    [
        ("cpu", torch.float32, 1e-6),
        pytest.param(
            "cuda", torch.bfloat16, 1e-2,
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ),
    ],
)  # fmt: skip
def test_documents_that_share_their_beginning_are_computed_as_if_each_had_its_own(
    device: str, dtype: torch.dtype, bound: float
) -> None:
    """Values and gradients; two rows, of which the second begins with a document alone."""
    numbers = np.array([[1, 1, 1, 2, 2, 3, 3, 3, 0, 0], [4, 4, 5, 5, 5, 6, 6, 7, 0, 0]])
    begins = np.array([[ALONE] * 3 + [0] * 5 + [ALONE] * 2, [ALONE] * 5 + [2] * 3 + [ALONE] * 2])
    documents = documents_of(numbers, [np.zeros((2, 9), np.float32)], device, begins)
    wide = tiny(hidden=128, heads=4, q_lora=64, kv_lora=64, nope_dim=32, rope_dim=16, v_dim=64)
    model = model_on_gpu(wide, dtype) if device == "cuda" else filled(wide)
    layer = model.root["layers"]["0"]
    assert isinstance(layer, Layer)
    x = torch.randn(18, 128, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    seed = torch.randn(18, 128, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    shared, apart = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = layer.attend(shared, 2, documents)
    out.backward(seed)
    expected = torch.zeros_like(out)
    # (tokens before, own tokens), among the nine inputs of each row
    for before, own in (
        ([], [0, 1, 2]), ([0, 1, 2], [3, 4]), ([0, 1, 2], [5, 6, 7]), ([], [8]),
        ([], [9, 10]), ([], [11, 12, 13]), ([11, 12, 13], [14, 15]), ([11, 12, 13], [16]), ([], [17]),
    ):  # fmt: skip
        alone = layer.attend(apart[[*before, *own]], 1, None)[len(before) :]
        alone.backward(seed[own])
        expected[own] = alone.detach()
    for ours, theirs in ((out.detach(), expected), (shared.grad, apart.grad)):
        assert ours is not None
        assert theirs is not None
        assert (ours - theirs).norm() < bound * theirs.norm()
    assert documents.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 0, 1, 0, 1, 2, 3, 4, 3, 0]
