"""DeepEP under the same contract: its kernels move the rows, and missing requirements are reported before a run starts.

V1 (`deep_ep.Buffer`, NVSHMEM), V2 (`ElasticBuffer`) and V2.5 (`EPBuffer`, both on NCCL) differ in constructors and in
what dispatch returns; only the two `_Port`s below know that. A routing is a dispatch of narrow rows: it returns
DeepEP's handle and the experts of each arrived row, and payloads then follow with the cached handle. DeepEP takes BF16
rows only, so a payload (FP8 with scales, routing weights) is sent as words reinterpreted as BF16, with no extra bytes.
Rows arrive once per rank, and the copies per expert and their sum are made here, as in `hierarchical`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.api import Dispatcher
from dryvine.comm.dispatch.copies import Copies
from dryvine.comm.dispatch.payload import WORD, Format
from dryvine.comm.dispatch.reach import nodes_of_ranks, reach
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.extras import LibraryMissing
from dryvine.comm.integers import round_up
from dryvine.comm.pending import Pending
from dryvine.comm.topology import LinkClass, Topology

# BF16 values in a row of a routing; the kernels want whole 16-byte vectors for each thread of a warp.
NARROW = 256
INSTEAD = "choose comm.dispatcher = hierarchical"


class _Port(ABC):
    """One version of DeepEP behind one interface. `handle` is DeepEP's own, of another type in each version."""

    buffer: Any

    @abstractmethod
    def plan_routing(self, rows: Tensor, experts_TK: Tensor, experts: int) -> tuple[Tensor, list[int], object]:
        """Local expert numbers of the arrived rows ([M, K], -1 where elsewhere), rows per expert, DeepEP's handle."""

    def dispatch(self, rows: Tensor, handle: object) -> Tensor:
        arrived: Tensor = self.buffer.dispatch(rows, handle=handle)[0]
        return arrived

    def combine(self, rows: Tensor, weights_MK: Tensor | None, handle: object) -> tuple[Tensor, Tensor | None]:
        summed, weights, _ = self.buffer.combine(rows, handle, topk_weights=weights_MK)
        return summed, weights


class _V1(_Port):
    """`deep_ep.Buffer`: sizes in bytes, a routing call of its own, six results."""

    def __init__(self, module: ModuleType, group: dist.ProcessGroup, setup: Setup) -> None:
        configs = [module.Buffer.get_dispatch_config(group.size()), module.Buffer.get_combine_config(group.size())]
        nvl = max(c.get_nvl_buffer_size_hint(setup.row_bytes, group.size()) for c in configs)
        rdma = max(c.get_rdma_buffer_size_hint(setup.row_bytes, group.size()) for c in configs)
        self.buffer = module.Buffer(group, nvl, rdma)

    def plan_routing(self, rows: Tensor, experts_TK: Tensor, experts: int) -> tuple[Tensor, list[int], object]:
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


class _V2(_Port):
    """`ElasticBuffer` (V2) or `EPBuffer` (V2.5): sizes in tokens, the routing within dispatch, five results."""

    def __init__(self, module: ModuleType, group: dist.ProcessGroup, setup: Setup) -> None:
        kind = getattr(module, "EPBuffer", None) or module.ElasticBuffer
        sizes = {"num_max_tokens_per_rank": setup.tokens, "hidden": setup.row_bytes // 2, "num_topk": setup.top_k}
        self.buffer = kind(group, **sizes, deterministic=True)

    def plan_routing(self, rows: Tensor, experts_TK: Tensor, experts: int) -> tuple[Tensor, list[int], object]:
        _, chosen, _, handle, _ = self.buffer.dispatch(rows, topk_idx=experts_TK, num_experts=experts)
        return chosen, list(handle.num_recv_tokens_per_expert_list), handle


def probe() -> tuple[str, str]:
    """(version, "") of the installed DeepEP, or ("", what is missing)."""
    try:
        module = importlib.import_module("deep_ep")
    except (ImportError, OSError, RuntimeError) as error:
        return "", f"deep_ep does not import ({error}); install DeepEP, or {INSTEAD}"
    for version, name in (("V2.5", "EPBuffer"), ("V2", "ElasticBuffer"), ("V1", "Buffer")):
        if hasattr(module, name):
            return version, ""
    return "", f"deep_ep has no EPBuffer, ElasticBuffer or Buffer, as known versions do; {INSTEAD}"


def check(world: int | None) -> None:
    """Raise LibraryMissing if DeepEP cannot be used here."""
    _version()


def _version() -> str:
    """The installed version. Raises LibraryMissing."""
    version, lacks = probe()
    if lacks:
        raise LibraryMissing(f"comm.dispatcher = deepep: {lacks}")
    return version


@dataclass(frozen=True)
class DeepEPHandle:
    """DeepEP's handle, and the copies per expert made after arrival."""

    theirs: object
    copies: Copies
    rows: tuple[int, ...]  # of a dispatch, over each of `Route.links`

    @property
    def counts(self) -> tuple[int, ...]:
        return self.copies.counts


class Route:
    """The links over which DeepEP takes this rank's tokens: to each node once, to the rank of the same rail, and from
    there to each rank that needs them. Every link that a token takes is counted by the rank that it starts from: which
    of two ranks sends it does not show here, and the sum over ranks is the same."""

    def __init__(self, topology: Topology, rank: int, experts: int) -> None:
        self.topology, self.share, self.here = topology, experts // topology.ranks, topology.node_of(rank)
        self.links: list[LinkClass] = [
            topology.link(topology.proxy(rank, topology.node_of(to)), to) for to in range(topology.ranks)
        ]
        self.links += ["inter"] * (len(topology.nodes) - 1)

    def reach(self, experts_TK: Tensor) -> Tensor:
        """Tokens for each rank, then for each node, on the device."""
        node_W = nodes_of_ranks(self.topology, experts_TK.device)
        hit = reach(experts_TK // self.share, node_W, len(self.topology.nodes))
        return torch.cat((hit.ranks.sum(0), hit.nodes.sum(0)))

    def rows(self, reached: list[int]) -> tuple[int, ...]:
        """Rows over each link, from the host copy of what `reach` returns."""
        to_here = self.topology.ranks + self.here  # no crossing
        return tuple(reached[:to_here] + reached[to_here + 1 :])


def build(setup: Setup) -> Dispatcher[DeepEPHandle]:
    return DeepEP(setup)


class DeepEP:
    """`Dispatcher` on DeepEP. Raises ValueError where DeepEP does not run, with what is lacking."""

    def __init__(self, setup: Setup) -> None:
        group = setup.mesh.experts if setup.mesh else None
        if group is None:
            raise ValueError("comm.dispatcher = deepep: one rank has no other to send to; use flat")
        version, module = _version(), importlib.import_module("deep_ep")
        self.port: _Port = _V1(module, group, setup) if version == "V1" else _V2(module, group, setup)
        self.route = Route(setup.group_topology, setup.rank, setup.experts)
        self.experts, self.alignment, self.meter = setup.experts, setup.alignment, setup.meter

    def plan_routing(self, experts_TK: Tensor, label: str = "") -> Pending[DeepEPHandle]:
        narrow = torch.zeros(len(experts_TK), NARROW, dtype=torch.bfloat16, device=experts_TK.device)
        reached = self.route.reach(experts_TK)
        # The host waits in here until DeepEP knows how many rows come.
        chosen_MK, used, theirs = self.port.plan_routing(narrow, experts_TK, self.experts)
        key_MK = torch.where(chosen_MK >= 0, chosen_MK.to(torch.int64), len(used))
        copies = Copies.of(key_MK, len(used), used, self.alignment)
        (reached,) = routing.read(reached)
        handle = DeepEPHandle(theirs, copies, self.route.rows(reached.tolist()))
        self._count(narrow, handle)
        return Pending.done(handle)

    def dispatch(
        self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: DeepEPHandle
    ) -> Pending[tuple[Tensor, ...]]:
        payload = rows if pairs is None else (*rows, pairs)
        wire = Format.of(payload)
        packed = _as_bf16(wire.pack(payload))
        self._count(packed, handle)
        words = self.port.dispatch(packed, handle.theirs).view(WORD)[:, : wire.words]
        return Pending.done(handle.copies.unpack(wire, words, paired=pairs is not None))

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: DeepEPHandle) -> Pending[tuple[Tensor, ...]]:
        weights = None if pairs is None else handle.copies.scattered(pairs.float())
        going = handle.copies.rank_sum(rows).to(torch.bfloat16)
        self._count(going, handle, *(() if weights is None else (weights,)))
        summed, back = self.port.combine(going, weights, handle.theirs)
        result = summed.to(rows.dtype)
        return Pending.done((result,) if pairs is None or back is None else (result, back.to(pairs.dtype)))

    def _count(self, rows: Tensor, handle: DeepEPHandle, *more: Tensor) -> None:
        """Combine takes dispatch's links backwards. What DeepEP adds to a row for itself is not counted."""
        row_bytes = sum(t.shape[1:].numel() * t.element_size() for t in (rows, *more))
        self.meter.add(self.route.links, handle.rows, row_bytes)


def _as_bf16(words: Tensor) -> Tensor:
    """Words as BF16 rows of whole warps' vectors (512 bytes); the kernels copy and never interpret them."""
    width = round_up(words.shape[1], 64)
    if width == words.shape[1]:
        return words.view(torch.bfloat16)
    padded = words.new_zeros((len(words), width))
    padded[:, : words.shape[1]] = words
    return padded.view(torch.bfloat16)
