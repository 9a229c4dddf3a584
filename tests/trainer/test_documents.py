"""Packed documents train as if each were alone: attention, positions, losses, gradients, recompute, MTP, layouts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen as torch_varlen

from dryvine.parallel.stage import Flight
from dryvine.trainer import verify
from dryvine.trainer.batches import read_batch
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.data.packed_tokens import PackedTokens
from dryvine.trainer.data.source import TokenSource
from dryvine.trainer.model import varlen
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.documents import ALONE, Documents, documents_of, same_document
from dryvine.trainer.model.layer import Layer
from dryvine.trainer.model.shape import Shape, Yarn
from dryvine.trainer.step import evaluate
from tests.support.documents import short_documents
from tests.support.model import filled, run_backward, run_forward, tiny, whole
from tests.support.rig import rig_of
from tests.trainer.test_data_order import write_dataset

Tiny = Callable[..., Config]
LENGTHS = ((5, 1, 9, 3, 6), (24,), (1,) * 4 + (20,), (13, 11))  # of the documents of a sequence of 24 tokens


def numbers_of(*sequences: tuple[int, ...], extra: int) -> np.ndarray:
    """Document numbers of sequences made of documents of these lengths; the last goes on."""
    rows = [np.repeat(np.arange(len(lengths)), lengths) for lengths in sequences]
    return np.stack([np.append(row, [row[-1]] * extra) for row in rows])


def plain_documents(*sequences: tuple[int, ...], depth: int = 0, device: str = "cpu") -> Documents:
    numbers = numbers_of(*sequences, extra=1 + depth)
    inside = [same_document(numbers, ahead, 1 + depth) for ahead in range(1, 2 + depth)]
    return documents_of(numbers, [same.astype(np.float32) for same in inside], device)


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


# -- what the kernel is given


def test_heads_are_padded_to_what_the_kernel_takes() -> None:
    q, k, v = (torch.randn(7, 2, width) for width in (12, 12, 8))
    heads = varlen.pad_heads(q, k, v)
    assert [t.shape[-1] for t in heads] == [16, 16, 16]
    assert torch.equal(heads[2][..., :8], v)
    assert not heads[2][..., 8:].any()
    wide = torch.randn(7, 2, 192)
    assert varlen.pad_heads(wide, wide, torch.randn(7, 2, 128))[0] is wide


def test_on_a_gpu_one_kernel_gets_all_documents() -> None:
    """Against a stand-in with the signature of torch's, on fake tensors: shapes, bounds, window and scale."""
    given = {}

    def record(*args: object, **named: object) -> Tensor:
        given.update(inspect.signature(torch_varlen_attn).bind(*args, **named).arguments)
        return torch.empty_like(given["query"])

    torch_varlen_attn = torch_varlen.varlen_attn
    documents = plain_documents(*LENGTHS)
    with FakeTensorMode(), mock.patch.object(torch_varlen, "varlen_attn", record):
        q, k, v = (torch.empty(96, 2, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        out = varlen.attend_documents(q, k, v, documents, 0.3)
    assert (out.shape, out.dtype) == ((96, 2, 16), torch.bfloat16)
    assert given["cu_seq_q"] is given["cu_seq_k"] is documents.bounds
    assert given["cu_seq_q"].dtype == torch.int32
    assert (given["max_q"], given["max_k"], given["scale"], given["window_size"]) == (24, 24, 0.3, (-1, 0))


def _alone(q_LAD: Tensor, k_LAD: Tensor, v_LAD: Tensor, scale: float) -> Tensor:
    """Attention over one document."""
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q_LAD, k_LAD, v_LAD))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.squeeze(0).transpose(0, 1)


class Saving(torch.autograd.Function):
    """The kernel's place on a CPU: saves its inputs and output as torch's does, and computes each document anew."""

    @staticmethod
    def forward(ctx, bounds, scale, *heads):  # type: ignore[no-untyped-def]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in heads]
            lengths = bounds.diff().tolist()
            parts = zip(*(t.split(lengths) for t in leaves), strict=True)
            out = torch.cat([_alone(*part, scale) for part in parts])
        ctx.save_for_backward(*heads, out.detach())
        ctx.bounds, ctx.scale = bounds, scale
        return out.detach()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors[:3]]
            parts = zip(*(t.split(ctx.bounds.diff().tolist()) for t in leaves), strict=True)
            out = torch.cat([_alone(*part, ctx.scale) for part in parts])
            return None, None, *torch.autograd.grad(out, leaves, grad)


def test_recompute_keeps_nothing_of_what_the_kernel_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel saves exactly the tensors that are made again, so they are known and dropped; and padded ones too."""
    monkeypatch.setattr(varlen, "_on_flash", lambda q: True)
    stand_in = lambda q, k, v, bounds, *_, scale, **__: Saving.apply(bounds, scale, q, k, v)  # noqa: E731
    monkeypatch.setattr(torch_varlen, "varlen_attn", stand_in)
    grads, kept = {}, {}
    for recompute in ((), ("mla_up",)):
        layer = filled(tiny(recompute=recompute)).root["layers"]["0"]
        x = torch.randn(96, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        out = layer.attend(x, 4, plain_documents(*LENGTHS))
        core = next(node for node in nodes(out.grad_fn) if "Saving" in type(node).__name__)
        kept[recompute] = [isinstance(raw, int) for raw in raw_saved(core)]
        out.sum().backward()
        grads[recompute] = x.grad
    assert kept[()] == [False] * 4
    assert kept["mla_up",] == [True, True, True, False]
    assert torch.equal(grads[()], grads["mla_up",])


def nodes(node: Any) -> Iterator[Any]:
    yield node
    for after, _ in node.next_functions:
        if after is not None:
            yield from nodes(after)


def raw_saved(node: Any) -> list[object]:
    """What the hooks made of the saved tensors: numbers for those to be made again."""
    return [saved.data if isinstance(saved.data, int) else saved for saved in node._raw_saved_tensors]


# -- where documents are


def test_windows_know_their_documents_across_shards(tmp_path: Path) -> None:
    write_dataset(tmp_path, [33, 40, 51])  # a document each
    packed = PackedTokens(tmp_path, "train")
    for start in range(0, 124, 5):
        for stop in (start + 1, min(start + 34, 124), 124):
            expected = [end for end in (33, 73, 124) if start < end < stop]
            assert packed.ends_between(start, stop).tolist() == expected
    source = TokenSource(tmp_path, "train", seq_len=10, extra=2, seed=5)
    numbers = source.documents(0, source.windows)
    owner = np.repeat([0, 1, 2], [33, 40, 51])
    for row, number in zip(numbers, range(source.windows), strict=True):
        start = source.order.window(number) * 10
        np.testing.assert_array_equal(row, owner[start : start + 12] - owner[start])


def test_a_real_corpus_ends_its_documents_where_its_end_tokens_are(corpus: Path) -> None:
    source = TokenSource(corpus, "train", seq_len=64, extra=2, seed=1)
    tokens, numbers = source.sequences(0, 200), source.documents(0, 200)
    ends = tokens[:, :-1] == source.packed.dataset.end_token
    np.testing.assert_array_equal(np.diff(numbers, axis=1) == 1, ends)


# -- a run

MASKED = ("data.mask=document", "batch.sequences=16")


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("parallel.pp=2", "parallel.schedule=dualpipe"), id="pp2", marks=pytest.mark.long),
        pytest.param(("parallel.dp=2", "parallel.schedule=dualpipev"), id="dp2", marks=pytest.mark.long),
        pytest.param(
            ("parallel.ep=2", "parallel.microbatch_sequences=2", 'model.recompute=["norm", "mla_up", "swiglu"]'),
            id="ep2",
        ),
    ],
)
def test_a_masked_run_trains_like_one_process(short: Tiny, layout: tuple[str, ...]) -> None:
    found = verify.compare(short(*MASKED, "model.layers=3", "batch.sequences=8", *layout))
    assert not [d for d in found if not d.fine]


@pytest.mark.long
@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe"),
        ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", 'model.recompute=["layer"]'),
        ("parallel.pp=2", "parallel.dp=2", "parallel.schedule=dualpipev"),
        ("parallel.pp=2", "parallel.dp=2", "parallel.schedule=zbv"),
        ("parallel.pp=2", "parallel.schedule=zb1p", "parallel.microbatch_sequences=2", 'model.recompute=["layer"]'),
        ("parallel.pp=4", "parallel.schedule=one_f_one_b"),
        ("parallel.pp=2", "parallel.chunks=2", "parallel.schedule=interleaved"),
        ("parallel.dp=2", "parallel.ep=2", "parallel.schedule=gpipe"),
    ],
    ids=lambda layout: " ".join(key.partition(".")[2] for key in layout),
)
def test_a_masked_run_trains_like_one_process_in_combined_layouts(short: Tiny, layout: tuple[str, ...]) -> None:
    found = verify.compare(short(*MASKED, *layout))
    assert not [d for d in found if not d.fine]


@pytest.fixture
def short(tiny: Tiny, tmp_path: Path) -> Tiny:
    """The tiny config on documents of a few tokens each."""
    folder = short_documents(tmp_path / "short")
    return lambda *overrides: tiny(f'data.source="{folder}"', *overrides)


def test_the_loss_is_the_mean_over_targets_inside_documents_whatever_the_microbatch(short: Tiny) -> None:
    """Microbatches with few such targets count for less."""
    losses = [evaluate(rig_of(short(*MASKED, f"parallel.microbatch_sequences={size}"))).loss for size in (1, 4, 16)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert evaluate(rig_of(short())).loss != pytest.approx(losses[0], rel=1e-4)


def test_weights_of_a_step_make_a_mean(short: Tiny) -> None:
    rig = rig_of(short(*MASKED, "parallel.microbatch_sequences=2"))
    batch = read_batch(rig, rig.data.train, 0, 16)
    for depth in (0, 1):
        weights = torch.stack([d.weights[depth] for d in batch.documents])  # type: ignore[union-attr, attr-defined]
        assert float(weights.mean()) == pytest.approx(1, rel=1e-6)
        assert len(weights.unique()) == 2
        assert 0.5 < float((weights > 0).float().mean()) < 0.95


def test_a_head_wider_than_the_kernel_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"no kernel for heads of nope_dim \+ rope_dim = 260"):
        tiny("data.mask=document", "model.nope_dim=256")
