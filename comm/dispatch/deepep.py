"""DeepEP under the same semantics: its kernels move the rows, and what it lacks is said before a run starts.

V1 (`deep_ep.Buffer`, NVSHMEM), V2 (`ElasticBuffer`) and V2.5 (`EPBuffer`, both on NCCL) differ in constructors and in
what dispatch returns; the two `_Port`s below are all that knows it. A layout is a dispatch of narrow rows: it gives
DeepEP's handle and each arrived row's experts, and payloads then follow with the cached handle. DeepEP takes BF16 rows
only, so a payload (FP8 with scales, routing weights) goes as words that it takes for BF16; that moves no byte more.
Rows arrive once per rank, and the copies per expert and their sum are made here, as in `hierarchical`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.exchange import Meter
from dryvine.comm.dispatch.payload import WORD, Format
from dryvine.comm.dispatch.routing import Sum
from dryvine.comm.pending import Pending

NARROW = 256  # BF16 values in a row of a layout; the kernels want whole 16-byte vectors for each warp


class _Port(Protocol):
    """One version of DeepEP, reduced to what is used here."""

    def plan_routing(self, rows: Tensor, experts_TK: Tensor, experts: int) -> tuple[Tensor, list[int], Any]:
        """Local expert numbers of the arrived rows ([M, K], -1 where elsewhere), rows per expert, DeepEP's handle."""
        ...

    def dispatch(self, rows: Tensor, handle: Any) -> Tensor: ...

    def combine(self, rows: Tensor, weights_MK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None]: ...


class _V1:
    """`deep_ep.Buffer`: sizes in bytes, a layout call of its own, six results."""

    def __init__(self, module: ModuleType, group: dist.ProcessGroup, hidden_bytes: int, **_: int) -> None:
        configs = [module.Buffer.get_dispatch_config(group.size()), module.Buffer.get_combine_config(group.size())]
        nvl = max(c.get_nvl_buffer_size_hint(hidden_bytes, group.size()) for c in configs)
        rdma = max(c.get_rdma_buffer_size_hint(hidden_bytes, group.size()) for c in configs)
        self.buffer = module.Buffer(group, nvl, rdma)

    def plan_routing(self, rows: Tensor, experts_TK: Tensor, experts: int) -> tuple[Tensor, list[int], Any]:
        per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(experts_TK, experts)
        _, chosen, _, counts, handle, _ = self.buffer.dispatch(
            rows,
            topk_idx=experts_TK,
            topk_weights=torch.ones_like(experts_TK, dtype=torch.float32),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        return chosen, list(counts), handle

    def dispatch(self, rows: Tensor, handle: Any) -> Tensor:
        return self.buffer.dispatch(rows, handle=handle)[0]

    def combine(self, rows: Tensor, weights_MK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None]:
        summed, weights, _ = self.buffer.combine(rows, handle, topk_weights=weights_MK)
        return summed, weights


class _V2:
    """`ElasticBuffer` or `EPBuffer`: sizes in tokens, the layout within dispatch, five results."""

    def __init__(self, kind: Any, group: dist.ProcessGroup, hidden_bytes: int, tokens: int, top_k: int) -> None:
        sizes = {"num_max_tokens_per_rank": tokens, "hidden": hidden_bytes // 2, "num_topk": top_k}
        self.buffer = kind(group, **sizes, deterministic=True)

    def plan_routing(self, rows: Tensor, experts_TK: Tensor, experts: int) -> tuple[Tensor, list[int], Any]:
        _, chosen, _, handle, _ = self.buffer.dispatch(rows, topk_idx=experts_TK, num_experts=experts)
        return chosen, list(handle.num_recv_tokens_per_expert_list), handle

    def dispatch(self, rows: Tensor, handle: Any) -> Tensor:
        return self.buffer.dispatch(rows, handle=handle)[0]

    def combine(self, rows: Tensor, weights_MK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None]:
        summed, weights, _ = self.buffer.combine(rows, handle, topk_weights=weights_MK)
        return summed, weights


def probe() -> tuple[str, str]:
    """(version, "") of the DeepEP that is installed, or ("", what is lacking)."""
    try:
        module = importlib.import_module("deep_ep")
    except (ImportError, OSError, RuntimeError) as error:
        return "", f"deep_ep does not import ({error}); install DeepEP, or choose comm.dispatcher = hierarchical"
    for version, name in (("V2.5", "EPBuffer"), ("V2", "ElasticBuffer"), ("V1", "Buffer")):
        if hasattr(module, name):
            return version, ""
    return "", "deep_ep has neither EPBuffer, ElasticBuffer nor Buffer: a version this adapter does not know"


@dataclass(frozen=True)
class DeepEPHandle:
    """DeepEP's handle, and the copies per expert made after arrival."""

    counts: tuple[int, ...]
    used: tuple[int, ...]
    theirs: Any
    pick: Tensor  # [R] (arrived row, choice) of each result row, as row * K + k
    place: Tensor
    arrived: tuple[int, int]  # M, K
    rank_sum: Sum


class DeepEP:
    """`Dispatcher` on DeepEP. `tokens` is the most that a rank dispatches, `hidden_bytes` the widest wire row."""

    def __init__(
        self, group: dist.ProcessGroup, experts: int, tokens: int, top_k: int, hidden_bytes: int, alignment: int = 1
    ) -> None:
        version, lacking = probe()
        if lacking:
            raise ValueError(f"comm.dispatcher = deepep: {lacking}")
        module = importlib.import_module("deep_ep")
        kind = _V1 if version == "V1" else _V2
        source = module if version == "V1" else getattr(module, {"V2": "ElasticBuffer", "V2.5": "EPBuffer"}[version])
        self.port: _Port = kind(source, group, hidden_bytes=hidden_bytes, tokens=tokens, top_k=top_k)
        self.experts, self.alignment, self.meter = experts, alignment, Meter()

    def plan_routing(self, experts_TK: Tensor, label: str = "") -> Pending[DeepEPHandle]:
        narrow = torch.zeros(len(experts_TK), NARROW, dtype=torch.bfloat16, device=experts_TK.device)
        chosen_MK, used, theirs = self.port.plan_routing(narrow, experts_TK, self.experts)
        rows, choices = chosen_MK.shape
        here_MK = chosen_MK >= 0
        key = torch.where(here_MK, chosen_MK.to(torch.int64), len(used)).flatten()
        pick = key.argsort(stable=True)[: sum(used)]
        padding = routing.Padding.of(used, self.alignment, pick.device)
        row_of = torch.empty(rows * choices, dtype=torch.int64, device=pick.device)
        row_of[pick] = padding.place
        pairs = routing.where(here_MK, sum(used))
        rank_sum = Sum.plan(pairs // choices, row_of[pairs], rows, choices)
        shape = (rows, choices)
        filled = padding.fill(pick)
        return Pending.done(DeepEPHandle(padding.counts, tuple(used), theirs, filled, padding.place, shape, rank_sum))

    def dispatch(
        self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: DeepEPHandle
    ) -> Pending[tuple[Tensor, ...]]:
        payload = rows if pairs is None else (*rows, pairs)
        wire = Format.of(payload)
        arrived = self.port.dispatch(_as_bf16(wire.pack(payload)), handle.theirs)
        words = arrived.view(WORD)[:, : wire.words]
        choices = handle.arrived[1]
        out = wire.unpack(words, handle.pick // choices)  # padding stays -1
        if pairs is not None:
            out[-1] = out[-1].gather(1, (handle.pick % choices)[:, None])[:, 0]
        return Pending.done(tuple(out))

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: DeepEPHandle) -> Pending[tuple[Tensor, ...]]:
        weights = None
        if pairs is not None:
            weights = torch.zeros(handle.arrived, dtype=torch.float32, device=pairs.device)
            weights.view(-1)[handle.pick[handle.place]] = pairs[handle.place].float()
        summed, back = self.port.combine(handle.rank_sum(rows).to(torch.bfloat16), weights, handle.theirs)
        result = summed.to(rows.dtype)
        return Pending.done((result,) if pairs is None or back is None else (result, back.to(pairs.dtype)))


def _as_bf16(words: Tensor) -> Tensor:
    """Words as BF16 rows of whole warps' vectors (512 bytes); the kernels copy and never interpret them."""
    width = -(-words.shape[1] // 64) * 64
    if width == words.shape[1]:
        return words.view(torch.bfloat16)
    padded = words.new_zeros((len(words), width))
    padded[:, : words.shape[1]] = words
    return padded.view(torch.bfloat16)
