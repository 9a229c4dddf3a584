"""Bytes by link class: of one all-to-all, of a pipeline message, of gradients and weights; and how long each takes.

Wire rows are those of `comm.dispatch.payload`: every tensor starts on a word of 8 bytes. Under even routing a token's
top-k experts are a uniform choice within its best groups; what a rank sends is then an expectation for two hops, and
exact for `flat`, which sends a row for each choice.

Legend: N tokens a rank dispatches, K choices each, W ranks of the expert-parallel group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import comb
from typing import NamedTuple

from dryvine.comm.dispatch.backends import AUTO, automatic, ring_bytes
from dryvine.comm.integers import ceil_div, round_up
from dryvine.comm.topology import LinkClass, Topology, by_sizes
from dryvine.launch.plan.hardware import GIGA, Machine
from dryvine.trainer.activations import DTYPE_BYTES
from dryvine.trainer.config import Config
from dryvine.trainer.graph_memory import recordable
from dryvine.trainer.tensors.tiles import TILE

WORD = 8
LinkBytes = Counter[LinkClass]


class RowBytes(NamedTuple):
    """Bytes of a wire row in each of the four all-to-alls of a MoE layer."""

    dispatch: int
    combine: int
    combine_backward: int  # dy, as dispatch sends it, without weights
    dispatch_backward: int  # dx and the weights' gradients


def row_bytes(config: Config, pair_values: int) -> RowBytes:
    """`pair_values`: routing weights that travel with a row, 1 with flat, K with two hops."""
    hidden = config.model.hidden
    plain = round_up(hidden * DTYPE_BYTES[config.run.dtype], WORD)
    sent = round_up(hidden, WORD) + round_up(ceil_div(hidden, TILE), WORD) if config.fp8.fp8_dispatch else plain
    weights = round_up(4 * pair_values, WORD)
    return RowBytes(sent + weights, plain, sent, plain + weights)


@dataclass(frozen=True)
class Dispatching:
    """The all-to-alls of one MoE layer and microbatch, sent by one rank: bytes by link class."""

    name: str  # of the dispatcher
    routing: LinkBytes
    dispatch: LinkBytes
    combine: LinkBytes
    combine_backward: LinkBytes
    dispatch_backward: LinkBytes
    recorded: bool = field(default=False, kw_only=True)  # its ops can be CUDA graphs: `nvlink` inside one node
    rings: int = field(default=0, kw_only=True)  # bytes that hop 2 keeps of a rank's memory (`copy_exchange`)

    @property
    def all(self) -> LinkBytes:
        """Bytes of a forward and a backward."""
        parts = (self.routing, self.dispatch, self.combine, self.combine_backward, self.dispatch_backward)
        return sum(parts, Counter())


class Messages(NamedTuple):
    """Seconds of the four all-to-alls of a MoE layer; routing is part of dispatch."""

    dispatch: float
    combine: float
    combine_backward: float
    dispatch_backward: float


def topology_of(config: Config, machine: Machine) -> Topology:
    """The machine's links, between the nodes of the config where it names them."""
    made, nodes = machine.topology(config.parallel.world), config.comm.topology.nodes
    return replace(made, nodes=by_sizes(nodes).nodes) if nodes else made


def dispatching(config: Config, topology: Topology, cuda: bool) -> Dispatching:
    """Traffic of the first rank of the first expert-parallel group. `topology`: that of the world."""
    group, asked = topology.of(range(config.parallel.ep)), config.comm.dispatcher
    name = automatic(group, recordable(config, cuda)) if asked == AUTO else asked
    if len(group.nodes) > 1 and name == "nvlink":
        return replace(_two_hops(config, group, name), rings=_rings(config, len(group.nodes[0])))
    if name == "nvlink" and group.ranks > 1:
        return _whole_tokens(config, group)
    return _two_hops(config, group, name) if name in ("hierarchical", "deepep", "fake") else _flat(config, group, name)


def _rings(config: Config, near: int) -> int:
    top_k = config.model.top_k
    return ring_bytes(near, max(row_bytes(config, top_k)), top_k, _tokens(config)) if near > 1 else 0


def _tokens(config: Config) -> int:
    return config.parallel.microbatch_sequences * config.data.seq_len


def _flat(config: Config, group: Topology, name: str) -> Dispatching:
    rows = _tokens(config) * config.model.top_k // group.ranks
    links = [group.link(0, other) for other in range(group.ranks)]

    def each(size: int) -> LinkBytes:
        return _sum((link, rows * size) for link in links)

    share = config.model.routed // group.ranks
    counts = _sum((link, 8 * (share + 1)) for link in links)
    return Dispatching(name, counts, *(each(size) for size in row_bytes(config, pair_values=1)))


def _whole_tokens(config: Config, group: Topology) -> Dispatching:
    """Every token to every rank, and a row of sums, or one for each choice, for every token back; tensors lie by
    themselves, without words."""
    n, hidden, values = _tokens(config), config.model.hidden, 4 * config.model.top_k
    plain = hidden * DTYPE_BYTES[config.run.dtype]
    sent = hidden + ceil_div(hidden, TILE) if config.fp8.fp8_dispatch else plain

    def each(size: int) -> LinkBytes:
        return _sum((group.link(0, other), n * size) for other in range(group.ranks))

    back = plain * (config.model.top_k if config.comm.sums == "by_choice" else 1)
    return Dispatching("nvlink", *map(each, (values, sent + values, back, sent, back + values)), recorded=True)


def _two_hops(config: Config, group: Topology, name: str) -> Dispatching:
    """Each row once per node to the same rail, then once per rank of that node; combine sends the same rows back."""
    n, shape = _tokens(config), config.model
    here = group.nodes[0]
    nodes_hit = [reached(config, len(node) / group.ranks) for node in group.nodes[1:]]
    rank_hit = reached(config, 1 / group.ranks)
    # Its own tokens within the node, and those that crossed to it, for each rank of the node.
    handed = n * rank_hit * (1 + len(group.clients(0)))

    def each(size: float) -> LinkBytes:
        found: LinkBytes = Counter({"inter": round(n * sum(nodes_hit) * size)})
        found["self"] += round(handed * size)
        found["intra"] += round(handed * (len(here) - 1) * size)
        return found

    share, chunks = shape.routed // group.ranks, config.comm.chunks if len(group.nodes) > 1 else 0
    message = 8 * (share + 2 + chunks * (1 + max(map(len, group.nodes))))
    counts = _sum((group.link(0, other), message) for other in range(group.ranks))
    return Dispatching(
        name, counts + each(8 * shape.top_k), *(each(size) for size in row_bytes(config, pair_values=shape.top_k))
    )


def reached(config: Config, part: float) -> float:
    """The probability that a token has an expert in a contiguous `part` of them under even routing: the token first
    has its best groups, then its top-k among their experts, all choices equally likely."""
    s = config.model
    in_group = s.routed // s.groups
    if part * s.groups >= 1:
        groups = round(part * s.groups)
        # All of its groups lie elsewhere, or those that do not give it no expert.
        return 1 - sum(
            comb(groups, g) * comb(s.groups - groups, s.group_limit - g) / comb(s.groups, s.group_limit)
            * _missed(s.group_limit * in_group, g * in_group, s.top_k)
            for g in range(min(groups, s.group_limit) + 1)
        )  # fmt: skip
    within = s.group_limit / s.groups
    return within * (1 - _missed(s.group_limit * in_group, round(part * s.routed), s.top_k))


def _missed(experts: int, held: int, top_k: int) -> float:
    """The probability that none of `top_k` out of `experts` is among `held` of them."""
    return comb(experts - held, top_k) / comb(experts, top_k)


def _sum(pairs: Iterable[tuple[LinkClass, int]]) -> LinkBytes:
    total: LinkBytes = Counter()
    for link, size in pairs:
        total[link] += size
    return total


def send_seconds(sent: LinkBytes, machine: Machine) -> float:
    """Seconds to send these bytes. Both kinds of link work at once, since two hops are chunked: the slower one
    counts."""
    if not (sent["intra"] or sent["inter"]):
        return 0.0
    slower = max(sent["intra"] / machine.intra.gigabytes, sent["inter"] / machine.inter.gigabytes) / GIGA
    return slower + machine.latency_us * 1e-6


def messages(one: Dispatching, machine: Machine) -> Messages:
    return Messages(
        send_seconds(one.routing, machine) + send_seconds(one.dispatch, machine),
        *(send_seconds(sent, machine) for sent in (one.combine, one.combine_backward, one.dispatch_backward)),
    )
