"""The two-hop plan: from the experts that tokens chose to every count and permutation that dispatch and combine need.

All counts travel in one all-to-all of fixed size: each rank tells each other rank what that rank must know as owner of
experts and, for ranks of other nodes on its rail, as proxy. So the host reads once, and every later length is known.
Then the expert numbers themselves make the two hops, and the permutations follow from them on the device. (Counts per
hop, one after the other, would stop the host at each.)

Legend: T tokens, K choices each; W ranks, N nodes, L ranks a node (the largest), X experts a rank, C chunks of tokens.
A stage is a delivery inside the node: stage 0 the node's own tokens, stage c + 1 what came from outside in chunk c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.exchange import Exchange
from dryvine.comm.dispatch.routing import Sum
from dryvine.comm.topology import Topology


@dataclass(frozen=True)
class Leg:
    """One all-to-all: `index` brings what lies here into sending order; rows to and from each rank of the group."""

    index: Tensor
    sends: tuple[int, ...]
    receives: tuple[int, ...]


@dataclass(frozen=True)
class TwoHopHandle:
    """Where each row goes. Hop 1 has a leg per chunk, hop 2 a leg per stage; combine walks them backwards."""

    counts: tuple[int, ...]  # rows given for each local expert, with padding
    used: tuple[int, ...]  # of which real
    label: str  # whose routing this is, for errors
    hop1: tuple[Leg, ...]
    hop2: tuple[Leg, ...]
    row: Tensor  # [R] which arrived row each result row is; -1 for padding
    choice: Tensor  # [R, 1] and which of its token's choices
    pick: Tensor  # [R_used] both, of each real row, as row * K + k
    choices: int
    rank_sum: Sum  # result rows -> arrived rows
    node_sums: tuple[Sum, ...]  # per chunk: rows back from the node's ranks -> rows that came over
    token_sum: Sum  # rows back from this node's ranks and from other nodes -> tokens
    place: Tensor  # [R_used] position in the result of each real row; the rest is padding

    def scattered(self, pairs_R: Tensor) -> Tensor:
        """Each pair's value at its choice, [M, K], and zero at choices that were not this rank's."""
        rows = sum(sum(leg.receives) for leg in self.hop2)
        values = pairs_R.new_zeros(rows * self.choices)
        values[self.pick] = pairs_R[self.place]
        return values.view(rows, self.choices)


@dataclass(frozen=True)
class Counts:
    """What this rank counted: `message[w]` is what rank w is told."""

    message: Tensor
    ranks: Tensor  # bool [T, W]: token t has an expert on rank w
    nodes: Tensor  # bool [T, N]


class Told:
    """What one rank told another, read from the host copy of its message (see `Planner._message` for the order)."""

    def __init__(self, values: Sequence[int], widths: Sequence[int], ranks: int) -> None:
        ends = list(accumulate(widths))
        parts = [list(values[end - width : end]) for end, width in zip(ends, widths, strict=True)]
        self.experts, (self.own,), self.node, chunked, (self.refused,) = parts
        self.ranks = [chunked[i : i + ranks] for i in range(0, len(chunked), ranks)]  # [chunk][place in node]


class Planner:
    """Makes handles for rank `me` of a topology; `rail` are the ranks of its inter-node group, ascending."""

    def __init__(
        self,
        topology: Topology,
        me: int,
        rail: tuple[int, ...],
        experts: int,
        chunks: int,
        alignment: int,
        device: torch.device,
    ) -> None:
        if experts % topology.ranks:
            raise ValueError(f"experts = {experts} do not divide over {topology.ranks} expert-parallel ranks")
        self.topology, self.me, self.rail, self.experts = topology, me, rail, experts
        self.chunks, self.alignment = chunks, alignment
        self.share = experts // topology.ranks
        self.here = topology.node_of(me)
        self.node = topology.nodes[self.here]
        self.widest = max(map(len, topology.nodes))
        self.abroad = [(p, topology.node_of(p)) for p in rail if topology.proxy(me, topology.node_of(p)) == p != me]
        self.clients = {p: topology.clients(p) for p in self.node}
        self.node_W = routing.upload([topology.node_of(w) for w in range(topology.ranks)], device)
        members = [[*node, *[topology.ranks] * (self.widest - len(node))] for node in topology.nodes]
        self.members_WL = routing.upload(members, device)[self.node_W]  # the ranks of each rank's node; W for none
        self.node_L = routing.upload(self.node, device)
        self.abroad_N = routing.upload([node for _, node in self.abroad], device)

    # Counting: device only.

    def bounds(self, tokens: int) -> list[tuple[int, int]]:
        return [(tokens * c // self.chunks, tokens * (c + 1) // self.chunks) for c in range(self.chunks)]

    def count(self, experts_TK: Tensor) -> Counts:
        tokens, device, ranks = len(experts_TK), experts_TK.device, self.topology.ranks
        rank_TK = experts_TK // self.share
        times_TW = torch.zeros(tokens, ranks, dtype=torch.int64, device=device)
        times_TW.scatter_add_(1, rank_TK, torch.ones_like(rank_TK))
        reach_TW = times_TW > 0
        times_TN = torch.zeros(tokens, len(self.topology.nodes), dtype=torch.int64, device=device)
        times_TN.index_add_(1, self.node_W, reach_TW.to(torch.int64))
        return Counts(self._message(experts_TK, times_TW, times_TN), reach_TW, times_TN > 0)

    @property
    def _widths(self) -> list[int]:
        return [self.share, 1, self.chunks, self.chunks * self.widest, 1]

    def _message(self, experts_TK: Tensor, times_TW: Tensor, times_TN: Tensor) -> Tensor:
        """int64 [W, M]: rows for each of its experts; tokens for it in all; then for its node, by chunk: tokens, and
        tokens for each rank; 1 to refuse."""
        ranks = len(self.node_W)
        parts = [routing.count(experts_TK, self.experts).view(ranks, self.share), (times_TW > 0).sum(0)[:, None]]
        cuts = [slice(*bound) for bound in self.bounds(len(experts_TK))]
        for_node = [(times_TN[cut] > 0).sum(0)[self.node_W][:, None] for cut in cuts]
        absent = times_TW.new_zeros(1)
        for_rank = [torch.cat(((times_TW[cut] > 0).sum(0), absent))[self.members_WL] for cut in cuts]
        return torch.cat([*parts, *for_node, *for_rank, routing.repeated(experts_TK).expand(ranks, 1)], dim=1)

    # Planning: one host read, then the expert numbers make the two hops.

    def plan(
        self, experts_TK: Tensor, counts: Counts, theirs: Tensor, inter: Exchange, intra: Exchange, label: str
    ) -> TwoHopHandle:
        read = routing.read(counts.message, theirs)  # the one host read of a forward dispatch
        ours, told = ([Told(row, self._widths, self.widest) for row in side.tolist()] for side in read)
        routing.refuse([rank for rank, t in enumerate(told) if t.refused])

        hop1 = self._hop1(counts, ours, told)
        came = self._cross(experts_TK, hop1, inter, label)
        hop2 = self._hop2(counts, came, hop1, ours, told)
        arrived_MK = self._deliver(experts_TK, came, hop1, hop2, intra, label)
        pairs = zip(hop1, hop2[1:], strict=True)
        most = experts_TK.shape[1]  # a token's experts are on no more ranks than that, nor on more nodes
        node_sums = tuple(Sum.plan(*sort_pair(leg.index), sum(first.receives), most) for first, leg in pairs)
        back = torch.cat([hop2[0].index, *(leg.index for leg in hop1)])
        token_sum = Sum.plan(*sort_pair(back), len(experts_TK), most)
        return self._arrange(arrived_MK, told, label, hop1, hop2, node_sums, token_sum)

    def _hop1(self, counts: Counts, ours: list[Told], told: list[Told]) -> tuple[Leg, ...]:
        proxies = dict(self.abroad)
        legs = []
        for chunk, (low, high) in enumerate(self.bounds(len(counts.nodes))):
            sends = tuple(ours[p].node[chunk] if p in proxies else 0 for p in self.rail)
            receives = tuple(told[s].node[chunk] if s in self.clients[self.me] else 0 for s in self.rail)
            reach_NT = counts.nodes[low:high].index_select(1, self.abroad_N).T
            legs.append(Leg(routing.where(reach_NT, sum(sends)) % max(1, high - low) + low, sends, receives))
        return tuple(legs)

    def _cross(self, experts_TK: Tensor, hop1: Sequence[Leg], inter: Exchange, label: str) -> Tensor:
        """Hop 1 of the expert numbers, all chunks at once: what came, [rows, K], by chunk, then source."""
        if not hop1:
            return experts_TK[:0]
        return relay(experts_TK[torch.cat([leg.index for leg in hop1])], hop1, inter, f"routing hop 1 of {label}")

    def _hop2(
        self, counts: Counts, came: Tensor, hop1: Sequence[Leg], ours: list[Told], told: list[Told]
    ) -> tuple[Leg, ...]:
        own = tuple(ours[q].own for q in self.node)
        place = routing.where(counts.ranks.index_select(1, self.node_L).T, sum(own)) % max(1, len(counts.ranks))
        legs = [Leg(place, own, tuple(told[p].own for p in self.node))]
        mine = self.node.index(self.me)
        for chunk, rows in enumerate(came.split([sum(leg.receives) for leg in hop1])):
            sends = tuple(sum(told[s].ranks[chunk][q] for s in self.clients[self.me]) for q in range(len(self.node)))
            receives = tuple(sum(told[s].ranks[chunk][mine] for s in self.clients[p]) for p in self.node)
            needs_LM = torch.stack([(rows // self.share == q).any(1) for q in self.node])
            legs.append(Leg(routing.where(needs_LM, sum(sends)) % max(1, len(rows)), sends, receives))
        return tuple(legs)

    def _deliver(
        self, experts_TK: Tensor, came: Tensor, hop1: Sequence[Leg], hop2: Sequence[Leg], intra: Exchange, label: str
    ) -> Tensor:
        """Hop 2 of the expert numbers, all stages at once: what arrived, [M, K], by stage, then rank of the node."""
        held = [experts_TK, *came.split([sum(leg.receives) for leg in hop1])]
        going = torch.cat([rows[leg.index] for rows, leg in zip(held, hop2, strict=True)])
        return relay(going, hop2, intra, f"routing hop 2 of {label}")

    def _sources(self, told: list[Told], device: torch.device) -> Tensor:
        """The rank that each arrived row started from, [M], in order of arrival."""
        mine = self.node.index(self.me)
        runs = [(p, told[p].own) for p in self.node]
        for chunk in range(self.chunks):
            runs += [(s, told[s].ranks[chunk][mine]) for p in self.node for s in self.clients[p]]
        ranks, lengths = routing.upload(runs, device).T
        return torch.repeat_interleave(ranks, lengths, output_size=sum(length for _, length in runs))

    def _arrange(
        self,
        arrived_MK: Tensor,
        told: list[Told],
        label: str,
        hop1: tuple[Leg, ...],
        hop2: tuple[Leg, ...],
        node_sums: tuple[Sum, ...],
        token_sum: Sum,
    ) -> TwoHopHandle:
        """The result's order: by expert, then source rank, then token; per source, rows arrive in token order."""
        rows, choices = arrived_MK.shape
        used = tuple(sum(column) for column in zip(*(t.experts for t in told), strict=True))
        mine_MK = arrived_MK // self.share == self.me
        source_M1 = self._sources(told, arrived_MK.device)[:, None]
        key_MK = (arrived_MK % self.share) * len(told) + source_M1
        last = self.share * len(told)
        pick = routing.stable_order(torch.where(mine_MK, key_MK, last), last + 1)[: sum(used)]
        padding = routing.Padding.of(used, self.alignment, pick.device)
        pairs = routing.where(mine_MK, sum(used))
        row_of = torch.empty(rows * choices, dtype=torch.int64, device=pick.device)
        row_of[pick] = padding.place
        filled = padding.fill(pick)
        return TwoHopHandle(
            counts=padding.counts,
            used=used,
            label=label,
            hop1=hop1,
            hop2=hop2,
            row=filled // choices,
            choice=(filled % choices)[:, None],
            pick=pick,
            choices=choices,
            rank_sum=Sum.plan(pairs // choices, row_of[pairs], rows, choices),
            node_sums=node_sums,
            token_sum=token_sum,
            place=padding.place,
        )


def sort_pair(target: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending targets, and for each the row that it takes."""
    ordered = target.to(torch.int32).sort(stable=True)  # half the passes of int64
    return ordered.values, ordered.indices


def relay(rows: Tensor, legs: Sequence[Leg], exchange: Exchange, what: str) -> Tensor:
    """Send expert numbers that lie by (leg, target) in one exchange; gives what came by (leg, source)."""
    sends = routing.upload([leg.sends for leg in legs], rows.device)
    receives = routing.upload([leg.receives for leg in legs], rows.device)
    to = [sum(leg.sends[i] for leg in legs) for i in range(exchange.size)]
    come = [sum(leg.receives[i] for leg in legs) for i in range(exchange.size)]
    going = rows[routing.transposed(sends, sum(to))].to(torch.int32)
    came = exchange.start(going, to, come, what=what).wait()
    return came[routing.transposed(receives.T.contiguous(), sum(come))].to(torch.int64)
