"""`dryvine doctor`: what a run would meet on this host: which ranks share a node, which links connect them, which
dispatcher `auto` takes, and faults of the host. `--before-run CONFIG` checks the host part on all nodes of a job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dryvine.comm.nvml import Hardware, nics, probe, refined
from dryvine.comm.topology import GroupLimit, Topology, TopologyConfig, discover, mismatch, spans
from dryvine.launch.health import gpus, host
from dryvine.launch.health.finding import ONE_PER_NODE, Finding
from dryvine.launch.options import Experts, TopK, numbers, used_experts
from dryvine.trainer.config import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

World = Annotated[int, typer.Option(min=0, help="ranks of the run; 0: WORLD_SIZE, SLURM_NTASKS or 1")]
Nodes = Annotated[str, typer.Option(help="ranks on each node, e.g. 8,8; empty: found")]
Groups = Annotated[str, typer.Option(help="node-limited routing as groups:limit, e.g. 8:4; empty: none")]
Hidden = Annotated[int, typer.Option(min=1, help="width of a token, for bytes (BF16)")]
BeforeRun = Annotated[Path | None, typer.Option(help="fail unless this node, and all that srun starts, can run CONFIG")]
Overrides = Annotated[list[str] | None, typer.Argument(help="of --before-run: table.key=value ...", show_default=False)]

OF_A_RUN = ("world", "nodes", "experts", "top_k", "groups", "hidden")


def doctor(
    context: typer.Context,
    overrides: Overrides = None,
    before_run: BeforeRun = None,
    world: World = 0,
    nodes: Nodes = "",
    experts: Experts = 256,
    top_k: TopK = None,
    groups: Groups = "",
    hidden: Hidden = 7168,
) -> None:
    """Print the topology as a table and as a picture, the dispatcher that `auto` takes, what does not fit, and
    faults of this host. With --before-run only the last, on every node of a job; exit code 1 if anything is bad."""
    if before_run is not None:
        if given := [name for name in OF_A_RUN if _given(context, name)]:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(f"{options}: with --before-run CONFIG says it: leave it out")
        from dryvine.launch.health.before_run import before_run as check_nodes

        raise typer.Exit(check_nodes(before_run, overrides or ()))
    from rich.console import Console

    from dryvine.comm.dispatch.choose import pick

    if overrides:
        raise ConfigError(f"{overrides[0]}: overrides are of --before-run CONFIG: add it, or leave them out")
    used = used_experts(top_k, experts)
    sizes = numbers("--nodes", nodes, "the ranks on each node") if nodes else ()
    limit = _group_limit(groups, experts) if groups else None
    console, hardware = Console(highlight=False), probe()
    topology = refined(_topology(sizes, world), hardware)
    console.print(f"{topology.ranks} ranks on {len(topology.nodes)} nodes; found by {topology.source}")
    console.print(table(topology))
    console.print(picture(topology))
    console.print(_devices(hardware))
    if experts % topology.ranks:
        unjudged = ", so --groups is not judged" if limit else ""
        console.print(f"dispatcher: none; {experts} experts do not divide over {topology.ranks} ranks{unjudged}")
    else:
        console.print("dispatcher: {} ({})".format(*pick(topology, used, experts, graphs=True)))
        if limit:
            console.print(mismatch(topology, experts, limit, hidden * 2) or "routing groups fit nodes")
    for line in _warnings(topology, os.environ.get("GLOO_SOCKET_IFNAME", "")):
        console.print(f"warning: {line}")
    for finding in _health(topology.ranks):
        console.print(str(finding), markup=False, soft_wrap=True)


def _given(context: typer.Context, name: str) -> bool:
    """Whether the user has typed an option, with whatever value."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _topology(sizes: tuple[int, ...], world: int) -> Topology:
    """Of `sizes` ranks on each node if they are given, else of `world` ranks, else as the launcher's variables say.
    Raises ConfigError."""
    count = sum(sizes) or world or _variable("WORLD_SIZE", 0) or _variable("SLURM_NTASKS", 1)
    try:
        return discover(count, TopologyConfig(nodes=sizes), os.environ)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _variable(name: str, otherwise: int) -> int:
    """A number in the environment. Raises ConfigError."""
    text = os.environ.get(name) or str(otherwise)
    if not text.isdecimal():
        raise ConfigError(f"{name} = {text!r} in the environment is no number: unset it")
    return int(text)


def _group_limit(text: str, experts: int) -> GroupLimit:
    """Of groups:limit. Raises ConfigError."""
    parts = text.split(":")
    if len(parts) == 2 and all(part.isdecimal() for part in parts):
        found = GroupLimit(*map(int, parts))
        if 1 <= found.limit <= found.groups and experts % found.groups == 0:
            return found
    raise ConfigError(f"--groups {text}: write groups:limit, such as 8:4, with groups that divide {experts} experts")


def _health(ranks: int) -> Iterator[Finding]:
    """The findings on this host alone."""
    yield from host.versions()
    yield from host.limits(ranks, bool(nics(Path("/sys"))))
    yield from host.name_resolves()
    yield from host.disk(Path("runs"))
    yield from host.ports("this host", _variable("MASTER_PORT", 29500))
    yield from gpus.gpus(0)
    yield from gpus.infiniband()
    yield from gpus.xids()
    yield Finding("unknown", "other nodes", f"one process; `{ONE_PER_NODE} dryvine doctor --before-run CONFIG`")


def table(topology: Topology) -> Table:
    """A row per rank: its node, its rail, and the ranks that it talks to over each link."""
    from rich.table import Table

    columns = ("rank", "node", "rail", f"over {topology.intra.kind}", f"over {topology.inter.kind}")
    made = Table(*columns, title=f"{speeds(topology)}")
    for number, node in enumerate(topology.nodes):
        for rail, rank in enumerate(node):
            far = [topology.proxy(rank, n) for n in range(len(topology.nodes)) if n != number]
            near = [r for r in node if r != rank]
            made.add_row(str(rank), str(number), str(rail), spans(near) or "-", spans(far) or "-")
    return made


def speeds(topology: Topology) -> str:
    intra, inter = topology.intra, topology.inter
    return f"{intra.kind} {intra.gigabytes:g} GB/s inside a node, {inter.kind} {inter.gigabytes:g} GB/s between nodes"


def picture(topology: Topology) -> str:
    """Nodes as rows, rails as columns; under a smaller node, which ranks stand in for its missing rails."""
    widest = max(map(len, topology.nodes))
    cell = len(str(topology.ranks)) + 3
    lines = []
    for number, node in enumerate(topology.nodes):
        if number:
            lines.append(" " * 10 + "".join("|".center(cell) for _ in range(widest)) + f"  {topology.inter.kind}")
        ranks = "".join(f"r{rank}".center(cell, "-" if len(node) > 1 else " ") for rank in node)
        inside = f"  {topology.intra.kind}" if len(node) > 1 else ""
        lines.append(f"node {number:<4} {ranks}{' ' * cell * (widest - len(node))}{inside}")
        if len(node) < widest:
            first, last = len(node), widest - 1
            rails = f"rail {first}" if first == last else f"rails {first} to {last}"
            lines.append(
                f"{'':10}{rails} of other nodes end at {spans([node[r % len(node)] for r in range(first, widest)])}"
            )
    return "\n".join(lines)


def _devices(hardware: Hardware) -> Table | str:
    from rich.table import Table

    if not hardware.gpus:
        return f"GPUs: none ({hardware.trouble})"
    made = Table("GPU", "PCI", "NVLink", "GB/s", "NIC", "GB/s", "fabric")
    for gpu in hardware.gpus:
        nic = (gpu.nic.name, f"{gpu.nic.gigabytes:g}") if gpu.nic else ("none", "-")
        made.add_row(gpu.name, gpu.bus_id, f"{gpu.nvlinks} links", f"{gpu.nvlink_gigabytes:g}", *nic, gpu.clique or "-")
    return made


def _warnings(topology: Topology, interface: str) -> list[str]:
    warnings = []
    if not topology.even:
        sizes = [len(node) for node in topology.nodes]
        warnings.append(f"nodes are uneven {sizes}: some rails end at one rank, which receives more than the others")
    if len(topology.nodes) > 1 and not interface and not Path("/sys/class/infiniband").exists():
        warnings.append(
            "GLOO_SOCKET_IFNAME is unset: gloo may bind to lo and hang; set it to the interface to other nodes"
        )
    return warnings
