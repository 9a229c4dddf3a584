"""Rigs on a CPU whose ops are recorded and replayed, and what stands in for the parts of a GPU that this needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional
from torch.nn.attention import varlen as torch_varlen

from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.single_rank import Local, SingleRank
from dryvine.comm.pending import Pending
from dryvine.parallel.graphs import Graphs
from dryvine.trainer.model import grouped, varlen
from dryvine.trainer.rig import Rig
from dryvine.trainer.tensors import in_order
from tests.support.masked_experts import add_masked_product, masked_product
from tests.support.tape import TapeRecorder

LONGEST = 64  # of the documents that the stand-in of the kernel takes


def recorded_by(recorder: TapeRecorder, rig: Rig) -> Rig:
    """The rig, which has run without graphs already and from now on records."""
    rig.graphs = Graphs(recorder, rig.dispatcher.meter, lambda: rig.model.loss_weights.mtp)
    rig.graphs.loaded.add(None)
    return rig


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single rank whose host does not read the counts, products of experts that do not either, and sums of rows that
    are sorted."""

    def plan_routing(self: SingleRank, experts_TK: Tensor, label: str = "") -> Pending[Local]:
        order = routing.by_expert(experts_TK, 1, self.experts)
        self._count(1, order.message)
        return Pending.done(Local.unread(order))

    monkeypatch.setattr(SingleRank, "plan_routing", plan_routing)
    monkeypatch.setattr(grouped, "grouped_product", masked_product)
    monkeypatch.setattr(grouped, "add_grouped_product", add_masked_product)
    monkeypatch.setattr(in_order, "_sorts", lambda total: True)


def attend_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over documents by one call, which reads on the device where they are, and writes nothing elsewhere; and
    sums of copies, of which the last goes on to the end of the indices."""
    monkeypatch.setattr(varlen, "_on_flash", lambda q: True)
    monkeypatch.setattr(varlen.functional, "embedding_bag", partial(_embedding_bag, functional.embedding_bag))
    monkeypatch.setattr(torch_varlen, "varlen_attn", _varlen_attn)


def _embedding_bag(
    on_cpu: Callable[..., Tensor], indices: Tensor, rows: Tensor, begin: Tensor, *, include_last_offset: bool = False,
    mode: str,
) -> Tensor:  # fmt: skip
    """CUDA's kernel takes 0 for where the first bag begins, and reads no offset behind the last bag."""
    begin = begin[:-1] if include_last_offset else begin
    return on_cpu(indices, rows, torch.cat((torch.zeros_like(begin[:1]), begin[1:])), mode=mode)


class _InDocuments(Function):
    """The same, but what is outside of documents has no gradient: whatever was in the memory."""

    @staticmethod
    def forward(ctx, x_PAD, bounds):  # type: ignore[no-untyped-def]
        ctx.bounds = bounds
        return x_PAD.clone()

    @staticmethod
    def backward(ctx, dx_PAD):  # type: ignore[no-untyped-def]
        inside = torch.arange(len(dx_PAD)) < ctx.bounds[-1]
        return torch.where(inside.view(-1, 1, 1), dx_PAD, torch.nan), None


def _varlen_attn(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, _: Tensor, longest: int, *rest: object, scale: float,
    window_size: Sequence[int],
) -> Tensor:  # fmt: skip
    """Sums of the same numbers in the same order, however many empty documents there are."""
    places = len(q)
    starts, at = bounds[:-1].long().unsqueeze(1), torch.arange(LONGEST)
    inside_DL = at < bounds.diff().unsqueeze(1)
    where_DL = torch.where(inside_DL, starts + at, 0)
    q, k, v = (_InDocuments.apply(t, bounds)[where_DL].transpose(1, 2) for t in (q, k, v))  # [D, A, L, ..]
    scores = (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) * scale
    seen = (at <= at.unsqueeze(1)) & inside_DL[:, None, None]
    chances = scores.masked_fill(~seen, -1e30).softmax(-1)
    out = (chances.unsqueeze(-1) * v.unsqueeze(2)).sum(3).transpose(1, 2)
    into = torch.where(inside_DL, starts + at, places).flatten()
    whole = torch.full((places + 1, *out.shape[2:]), torch.nan, dtype=out.dtype)
    return whole.index_copy(0, into, out.flatten(0, 1))[:places]
