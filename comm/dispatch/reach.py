"""Which ranks and nodes a rank's tokens are sent to: the basis of the two-hop plan, and of counting its bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dryvine.comm.dispatch import routing
from dryvine.comm.topology import Topology


class Reach(NamedTuple):
    """Token t has an expert on rank w: ranks[t, w], bool [T, W]; on node n: nodes[t, n], bool [T, N]."""

    ranks: Tensor
    nodes: Tensor


def nodes_of_ranks(topology: Topology, device: torch.device) -> Tensor:
    """The node of each rank, int64 [W]."""
    return routing.upload([topology.node_of(rank) for rank in range(topology.ranks)], device)


def reach(rank_TK: Tensor, node_W: Tensor, nodes: int) -> Reach:
    """`rank_TK` is the rank of each choice, `node_W` as from `nodes_of_ranks`. The host waits for nothing."""
    ranks_TW = torch.zeros((len(rank_TK), len(node_W)), dtype=torch.bool, device=rank_TK.device)
    nodes_TN = torch.zeros((len(rank_TK), nodes), dtype=torch.bool, device=rank_TK.device)
    return Reach(ranks_TW.scatter_(1, rank_TK, True), nodes_TN.scatter_(1, node_W[rank_TK], True))
