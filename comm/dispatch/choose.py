"""Which dispatcher a run gets: the one that is named, or what `auto` picks for the topology."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from math import comb
from types import ModuleType

from dryvine.comm.dispatch import deepep
from dryvine.comm.dispatch.api import AnyDispatcher
from dryvine.comm.dispatch.backends import AUTO, BACKENDS, automatic, check_name
from dryvine.comm.dispatch.rounds import InRounds
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.extras import LibraryMissing, lacking
from dryvine.comm.topology import Topology


def make_dispatcher(name: str, setup: Setup, imbalance: float = 0.0) -> AnyDispatcher:
    """The dispatcher of this rank's expert-parallel group. Collective over the world.

    `name` is a key of BACKENDS or "auto". With `imbalance` > 0 a dispatch goes in rounds where the busiest rank would
    receive more than that many times the mean. Raises ValueError where the backend cannot run here.
    """
    if name == AUTO:
        name = automatic(setup.group_topology, setup.graphs)
    build: Callable[[Setup], AnyDispatcher] = _backend(check_name(name)).build
    dispatcher = build(setup)
    return InRounds(dispatcher, setup.exchange(), setup.experts, imbalance) if imbalance else dispatcher


def check_library(name: str, world: int | None = None) -> None:
    """Raise LibraryMissing if `name`, as for `make_dispatcher`, needs one that cannot be used here. Not collective: it
    is asked before ranks meet. `world`: how many they are; None if this process is none of them."""
    if name != AUTO and (check := getattr(_backend(name), "check", None)):
        check(world)


def _backend(name: str) -> ModuleType:
    """The module of a dispatcher. Raises LibraryMissing."""
    try:
        return import_module(BACKENDS[name])
    except ImportError as error:
        raise LibraryMissing(f"comm.dispatcher = {name}: {lacking(error)}") from None
    except RuntimeError as error:  # mpi4py found no MPI
        raise LibraryMissing(f"comm.dispatcher = {name}: {error}") from None


def pick(topology: Topology, top_k: int, experts: int, graphs: bool = False) -> tuple[str, str]:
    """What `auto` takes for an expert-parallel group, and why, in one line; `graphs` as in `automatic`."""
    name = automatic(topology, graphs)
    if topology.ranks == 1:
        return name, "one expert-parallel rank: nothing travels"
    if name == "nvlink" and len(topology.nodes) == 1:
        return name, f"{topology.ranks} ranks joined by NVLink, whose ops are CUDA graphs: tokens go by copy engine"
    if len(topology.nodes) == 1:
        return (
            name,
            f"one node of {topology.ranks} ranks: no crossing to save, and one hop is quicker than a plan for two",
        )
    crossings = expected_crossings(topology, top_k, experts)
    version = deepep.probe()[0]
    also = f"; DeepEP {version} is installed and can be asked for" if version else ""
    inside = "; inside nodes it goes by copy engine" if name == "nvlink" else ""
    return name, (
        f"{len(topology.nodes)} nodes: a token crosses {topology.inter.kind} {crossings.once:.2f} times, "
        f"with flat {crossings.each:.2f} times{inside}{also}"
    )


@dataclass(frozen=True)
class Crossings:
    """Expected rows per token that leave its node: `once` per node as hierarchical sends, `each` choice as flat."""

    once: float
    each: float


def expected_crossings(topology: Topology, top_k: int, experts: int) -> Crossings:
    """For routing that is even over experts and not limited to groups; from rank 0's node."""
    share = experts // topology.ranks
    held = [len(node) * share for node in topology.nodes[1:]]
    # A node with n of the experts is missed when all top_k choices fall on the others.
    missed = [comb(experts - n, top_k) / comb(experts, top_k) for n in held]
    return Crossings(sum(1 - m for m in missed), top_k * sum(held) / experts)
