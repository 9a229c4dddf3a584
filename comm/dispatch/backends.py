"""The dispatchers by name, each with the module that builds it. Imports no torch, so that a config is checked with it.

A new dispatcher is a file with a function `build(setup: Setup) -> Dispatcher[...]` and a line here; the config then
accepts its name. Modules are imported when they are asked for: `mpi` starts MPI by being imported, and a login node
that checks a config has no torch. (A dict of functions would need a second list of names for the config.)
"""

from __future__ import annotations

from dryvine.comm.integers import round_up
from dryvine.comm.topology import Topology

BACKENDS: dict[str, str] = {
    "flat": "dryvine.comm.dispatch.flat",
    "hierarchical": "dryvine.comm.dispatch.hierarchical",
    "nvlink": "dryvine.comm.dispatch.nvlink",
    "deepep": "dryvine.comm.dispatch.deepep",
    "mpi": "dryvine.comm.dispatch.mpi",
    "fake": "dryvine.comm.dispatch.fake",
}
# Messages that `nvlink` has room for at once: two of a forward and two of a backward, as one is read while the next
# is written. Their memory is planned.
WINDOW_SLOTS = 4
# Of hop 2 by copy engine (`copy_exchange`), for each pair of ranks: as one slot is filled, others are on their way and
# emptied. 8 MiB take 22 us over NVLink, a few times what a flag takes.
RING_SLOTS = 4
PIECE_BYTES = 8 << 20
# Ranks of a node for which `auto` takes `nvlink`: others have not been measured.
NVLINK_RANKS = 2
AUTO = "auto"  # let `choose.pick` take one


def check_name(name: str) -> str:
    """`name` if it is a dispatcher's or "auto"; else raises ValueError with the names that there are."""
    if name != AUTO and name not in BACKENDS:
        raise ValueError(f"{name!r}: no such dispatcher; choose {AUTO} or one of {', '.join(BACKENDS)}")
    return name


def automatic(group: Topology, graphs: bool = False) -> str:
    """What `auto` takes for an expert-parallel group: two hops as soon as it spans nodes. `graphs`: CUDA graphs record
    ops whose dispatcher lets them; without graphs nvlink has not been faster than flat in one node."""
    by_copy = group.intra.kind == "NVLink" and max(map(len, group.nodes)) == NVLINK_RANKS
    if len(group.nodes) > 1:
        return "nvlink" if by_copy else "hierarchical"
    return "nvlink" if graphs and by_copy else "flat"


def piece_bytes(row_bytes: int, top_k: int, tokens: int) -> int:
    """A slot of `copy_exchange`: for rows of `row_bytes` bytes with two values for each choice, no more of them than a
    small group sends."""
    widest = row_bytes + 8 * top_k + 64  # each tensor of a row is rounded up by itself
    return min(PIECE_BYTES, round_up(tokens * widest, 256))


def ring_bytes(ranks: int, row_bytes: int, top_k: int, tokens: int) -> int:
    """Of `copy_exchange`, on each of a node's `ranks` ranks."""
    return ranks * RING_SLOTS * piece_bytes(row_bytes, top_k, tokens)
