"""What the attention kernel is given of packed documents, and what is kept of it: by stand-ins with its signature."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen as torch_varlen

from dryvine.trainer.model import varlen
from tests.support.documents import LENGTHS, plain_documents
from tests.support.model import filled, tiny


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
