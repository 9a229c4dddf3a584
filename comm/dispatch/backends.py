"""The dispatchers by name, each with the module that builds it. Imports no torch, so that a config is checked with it.

A new dispatcher is a file with a function `build(setup: Setup) -> Dispatcher[...]` and a line here; the config then
accepts its name. Modules are imported when they are asked for: `mpi` starts MPI by being imported, and a login node
that checks a config has no torch. (A dict of functions would need a second list of names for the config.)
"""

from __future__ import annotations

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
# Ranks of a group for which `auto` takes `nvlink`: others have not been measured.
NVLINK_RANKS = 2
AUTO = "auto"  # let `choose.pick` take one


def check_name(name: str) -> str:
    """`name` if it is a dispatcher's or "auto"; else raises ValueError with the names that there are."""
    if name != AUTO and name not in BACKENDS:
        raise ValueError(f"{name!r}: no such dispatcher; choose {AUTO} or one of {', '.join(BACKENDS)}")
    return name


def automatic(group: Topology, graphs: bool = False) -> str:
    """What `auto` takes for an expert-parallel group: two hops as soon as it spans nodes. `graphs`: CUDA graphs record
    ops whose dispatcher lets them; without graphs nvlink has not been faster than flat."""
    if len(group.nodes) > 1:
        return "hierarchical"
    return "nvlink" if graphs and group.ranks == NVLINK_RANKS and group.intra.kind == "NVLink" else "flat"
