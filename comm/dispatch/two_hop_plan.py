"""The two-hop plan: from the experts that tokens chose to every count and permutation that dispatch and combine need.

All counts travel in one all-to-all of fixed size: each rank tells each other rank what that rank must know as owner of
experts and, for ranks of other nodes on its rail, as proxy. So the host reads once, and every later length is known.
Then the expert numbers themselves make the two hops, and the permutations follow from them on the device. (Counts per
hop, one after the other, would stop the host at each.)

Legend: T tokens, K choices each; W ranks, N nodes, L ranks a node (the largest), X experts a rank, C chunks of tokens.
A stage is a delivery inside the node: stage 0 the own tokens of the node, stage c + 1 those that crossed in chunk c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.copies import Copies
from dryvine.comm.dispatch.exchange import Exchange
from dryvine.comm.dispatch.hop_groups import HopGroups
from dryvine.comm.dispatch.reach import Reach, nodes_of_ranks, reach
from dryvine.comm.dispatch.routing import Sum
from dryvine.comm.pending import Pending


@dataclass(frozen=True)
class Leg:
    """One all-to-all: `index` brings what lies here into sending order; rows to and from each rank of the group."""

    index: Tensor
    sends: tuple[int, ...]
    receives: tuple[int, ...]

    @property
    def sent(self) -> int:
        return sum(self.sends)

    @property
    def received(self) -> int:
        return sum(self.receives)

    def there(self, exchange: Exchange, rows: Tensor, into: Tensor, what: str) -> Pending[Tensor]:
        return exchange.start(rows, self.sends, self.receives, into, what)

    def back(self, exchange: Exchange, rows: Tensor, into: Tensor, what: str) -> Pending[Tensor]:
        return exchange.start(rows, self.receives, self.sends, into, what)


@dataclass(frozen=True)
class TwoHopHandle:
    """Where each row goes. Hop 1 has a leg per chunk, hop 2 a leg per stage; combine walks them backwards."""

    label: str  # whose routing this is, for errors
    hop1: tuple[Leg, ...]
    hop2: tuple[Leg, ...]
    copies: Copies
    node_sums: tuple[Sum, ...]  # per chunk: rows back from the node's ranks -> rows that crossed
    token_sum: Sum  # rows back from this node's ranks and from other nodes -> tokens

    @property
    def counts(self) -> tuple[int, ...]:
        return self.copies.counts

    def stages(self, arrived: Tensor) -> list[tuple[Leg, Tensor]]:
        """Each leg of hop 2 with its part of the rows that arrive, [M, ...]."""
        return list(zip(self.hop2, arrived.split([leg.received for leg in self.hop2]), strict=True))


@dataclass(frozen=True)
class Counted:
    """What this rank counted: where its tokens go, and `message[w]`, what it tells rank w (see `Planner._message`)."""

    message: Tensor
    hit: Reach


class Counts:
    """What one rank told another, read from the host copy of its message."""

    def __init__(self, values: Sequence[int], widths: Sequence[int], ranks: int) -> None:
        ends = list(accumulate(widths))
        parts = [list(values[end - width : end]) for end, width in zip(ends, widths, strict=True)]
        # Rows for each of the receiver's experts; tokens for it in all; tokens for its node by chunk.
        self.experts, (self.own,), self.node, chunked, (self.refused,) = parts
        # Tokens for each rank of the receiver's node: [chunk][place in node].
        self.ranks = [chunked[i : i + ranks] for i in range(0, len(chunked), ranks)]


class Planner:
    """Makes the handles of one rank of an expert-parallel group."""

    def __init__(self, groups: HopGroups, experts: int, chunks: int, alignment: int, device: torch.device) -> None:
        topology = groups.topology
        if experts % topology.ranks:
            raise ValueError(f"experts = {experts} do not divide over {topology.ranks} expert-parallel ranks")
        self.topology, self.me, self.rail = topology, groups.rank, groups.rail_ranks
        self.inter, self.intra = groups.rail, groups.node
        self.experts, self.share, self.alignment = experts, experts // topology.ranks, alignment
        self.chunks = chunks if len(topology.nodes) > 1 else 0
        self.node = topology.nodes[topology.node_of(self.me)]
        self.place_in_node = self.node.index(self.me)
        self.widest = max(map(len, topology.nodes))
        # The ranks of other nodes to which this one sends in hop 1, and their nodes.
        self.proxies = {p: topology.node_of(p) for p in self.rail if self._is_proxy(p)}
        self.clients = {p: topology.clients(p) for p in self.node}
        self.node_W = nodes_of_ranks(topology, device)
        # The ranks of each rank's node; W where a smaller node has none.
        members = [[*node, *[topology.ranks] * (self.widest - len(node))] for node in topology.nodes]
        self.members_WL = routing.upload(members, device)[self.node_W]
        self.node_L = routing.upload(self.node, device)
        self.proxied_N = routing.upload(list(self.proxies.values()), device)

    def _is_proxy(self, rank: int) -> bool:
        """Whether `rank` takes in, on another node, what this rank sends there."""
        return rank != self.me and self.topology.proxy(self.me, self.topology.node_of(rank)) == rank

    # Counting: device only.

    def bounds(self, tokens: int) -> list[tuple[int, int]]:
        """First and end token of each chunk."""
        return [(tokens * c // self.chunks, tokens * (c + 1) // self.chunks) for c in range(self.chunks)]

    def count(self, experts_TK: Tensor) -> Counted:
        hit = reach(experts_TK // self.share, self.node_W, len(self.topology.nodes))
        return Counted(self._message(experts_TK, hit), hit)

    @property
    def _widths(self) -> list[int]:
        """Of the parts of a message."""
        return [self.share, 1, self.chunks, self.chunks * self.widest, 1]

    def _message(self, experts_TK: Tensor, hit: Reach) -> Tensor:
        """int64 [W, sum of widths]: rows for each of its experts; tokens for it in all; then for its node, by chunk:
        tokens, and tokens for each rank; 1 to refuse."""
        ranks = len(self.node_W)
        per_expert = routing.count(experts_TK, self.experts).view(ranks, self.share)
        chunks = [slice(*bound) for bound in self.bounds(len(experts_TK))]
        for_node = [hit.nodes[chunk].sum(0)[self.node_W][:, None] for chunk in chunks]
        absent = experts_TK.new_zeros(1)  # what members_WL finds at W
        for_rank = [torch.cat((hit.ranks[chunk].sum(0), absent))[self.members_WL] for chunk in chunks]
        refused = routing.repeated(experts_TK).expand(ranks, 1)
        return torch.cat([per_expert, hit.ranks.sum(0)[:, None], *for_node, *for_rank, refused], dim=1)

    # Planning: one host read, then the expert numbers make the two hops.

    def plan(self, experts_TK: Tensor, counted: Counted, theirs: Tensor, label: str) -> TwoHopHandle:
        """`theirs` is what every rank told this one, [W, sum of widths]. Raises ValueError where a rank refuses."""
        read = routing.read(counted.message, theirs)  # the one host read of a forward dispatch
        to_rank, from_rank = ([Counts(row, self._widths, self.widest) for row in side.tolist()] for side in read)
        routing.refuse([rank for rank, counts in enumerate(from_rank) if counts.refused])
        hop1 = self._hop1(counted.hit, to_rank, from_rank)
        crossed = self._cross(experts_TK, hop1, label)
        hop2 = self._hop2(counted.hit, crossed, to_rank, from_rank)
        arrived_MK = self._deliver([experts_TK, *crossed], hop2, label)
        most = experts_TK.shape[1]  # a token's experts are on no more ranks than that, nor on more nodes
        node_sums = (
            Sum.plan(*sort_pair(delivery.index), len(rows), most)
            for rows, delivery in zip(crossed, hop2[1:], strict=True)
        )
        back = torch.cat([hop2[0].index, *(leg.index for leg in hop1)])
        token_sum = Sum.plan(*sort_pair(back), len(experts_TK), most)
        return TwoHopHandle(label, hop1, hop2, self._copies(arrived_MK, from_rank), tuple(node_sums), token_sum)

    def _hop1(self, hit: Reach, to_rank: list[Counts], from_rank: list[Counts]) -> tuple[Leg, ...]:
        """Tokens of each chunk to the proxies on the nodes that they reach."""
        legs = []
        for chunk, (low, high) in enumerate(self.bounds(len(hit.nodes))):
            sends = tuple(to_rank[p].node[chunk] if p in self.proxies else 0 for p in self.rail)
            receives = tuple(from_rank[s].node[chunk] if s in self.clients[self.me] else 0 for s in self.rail)
            # Positions in [proxies, tokens of the chunk], so by proxy, then token.
            reach_NT = hit.nodes[low:high].index_select(1, self.proxied_N).T
            legs.append(Leg(routing.where(reach_NT, sum(sends)) % max(1, high - low) + low, sends, receives))
        return tuple(legs)

    def _cross(self, experts_TK: Tensor, hop1: Sequence[Leg], label: str) -> list[Tensor]:
        """Hop 1 of the expert numbers, all chunks in one exchange: what arrives per chunk, [rows, K] by source."""
        if not hop1:
            return []
        going = experts_TK[torch.cat([leg.index for leg in hop1])]
        crossed = relay(going, hop1, self.inter, f"routing hop 1 of {label}")
        return list(crossed.split([leg.received for leg in hop1]))

    def _hop2(
        self, hit: Reach, crossed: Sequence[Tensor], to_rank: list[Counts], from_rank: list[Counts]
    ) -> tuple[Leg, ...]:
        """Stage 0: this rank's tokens to the ranks of its node; stage c + 1: what crossed to it in chunk c."""
        own = tuple(to_rank[q].own for q in self.node)
        token = routing.where(hit.ranks.index_select(1, self.node_L).T, sum(own)) % max(1, len(hit.ranks))
        legs = [Leg(token, own, tuple(from_rank[p].own for p in self.node))]
        for chunk, rows in enumerate(crossed):
            sends = tuple(self._handed_on(from_rank, chunk, self.me, place) for place in range(len(self.node)))
            receives = tuple(self._handed_on(from_rank, chunk, p, self.place_in_node) for p in self.node)
            needs_LM = torch.stack([(rows // self.share == q).any(1) for q in self.node])
            legs.append(Leg(routing.where(needs_LM, sum(sends)) % max(1, len(rows)), sends, receives))
        return tuple(legs)

    def _handed_on(self, from_rank: list[Counts], chunk: int, proxy: int, place: int) -> int:
        """Rows of a chunk that `proxy` hands on to the rank at `place` in this node."""
        return sum(from_rank[client].ranks[chunk][place] for client in self.clients[proxy])

    def _deliver(self, held: Sequence[Tensor], hop2: Sequence[Leg], label: str) -> Tensor:
        """Hop 2 of the expert numbers, all stages in one exchange: what arrived, [M, K], by stage, then rank."""
        going = torch.cat([rows[leg.index] for rows, leg in zip(held, hop2, strict=True)])
        return relay(going, hop2, self.intra, f"routing hop 2 of {label}")

    def _sources(self, from_rank: list[Counts], device: torch.device) -> Tensor:
        """The rank that each arrived row started from, [M], in order of arrival."""
        runs = [(p, from_rank[p].own) for p in self.node]
        for chunk in range(self.chunks):
            runs += [(s, from_rank[s].ranks[chunk][self.place_in_node]) for p in self.node for s in self.clients[p]]
        ranks, lengths = routing.upload(runs, device).T
        return torch.repeat_interleave(ranks, lengths, output_size=sum(length for _, length in runs))

    def _copies(self, arrived_MK: Tensor, from_rank: list[Counts]) -> Copies:
        """Results lie by expert, then source rank, then token; per source, rows arrive in token order."""
        used = [sum(column) for column in zip(*(counts.experts for counts in from_rank), strict=True)]
        source_M1 = self._sources(from_rank, arrived_MK.device)[:, None]
        keys = self.share * len(from_rank)
        key_MK = (arrived_MK % self.share) * len(from_rank) + source_M1
        return Copies.of(torch.where(arrived_MK // self.share == self.me, key_MK, keys), keys, used, self.alignment)


def sort_pair(target: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending targets, and for each the row that it takes."""
    ordered = target.to(torch.int32).sort(stable=True)  # half the passes of int64
    return ordered.values, ordered.indices


def relay(rows: Tensor, legs: Sequence[Leg], exchange: Exchange, what: str) -> Tensor:
    """Send expert numbers that lie by (leg, target) in one exchange; returns what arrives by (leg, source)."""
    sends = routing.upload([leg.sends for leg in legs], rows.device)
    receives = routing.upload([leg.receives for leg in legs], rows.device)
    to = [sum(leg.sends[i] for leg in legs) for i in range(exchange.size)]
    come = [sum(leg.receives[i] for leg in legs) for i in range(exchange.size)]
    # An exchange sends by target, so rows are brought to (target, leg) before it and back to (leg, source) after it.
    going = rows[routing.transposed(sends, sum(to))].to(torch.int32)
    arrived = exchange.start(going, to, come, what=what).wait()
    return arrived[routing.transposed(receives.T.contiguous(), sum(come))].to(torch.int64)
