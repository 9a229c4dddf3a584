"""`dryvine doctor --before-run CONFIG`: checks whether this node, and all nodes together, can run CONFIG. The batch
script runs one process a node before it starts the ranks.

It takes a job's nodes for some seconds and saves the hours after which a faulty GPU, a full disk or a host with another
checkout would have shown. A bad node ends the job, with the node named.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dryvine.comm.agreement import Disagreement
from dryvine.comm.integers import ceil_div
from dryvine.comm.nvml import nics
from dryvine.comm.place import LaunchedRank, find_place
from dryvine.comm.watch import Watch
from dryvine.comm.world import in_world, rendezvous, set_environment, share_refusal
from dryvine.launch.health import gpus, host
from dryvine.launch.health.between import Node, compare, visit
from dryvine.launch.health.finding import ONE_PER_NODE, Finding
from dryvine.trainer.checks import REFUSED, open_checked
from dryvine.trainer.config import Config
from dryvine.trainer.facts import facts
from dryvine.trainer.model.shape import count_parameters
from dryvine.trainer.run_plan import load_plan

DEADLINE = 120.0  # seconds that nodes wait for each other
FP32, BF16 = 4, 2


def before_run(path: Path, overrides: Sequence[str]) -> int:
    """Check, print on the first node, and return the exit code: 1 if a node is bad. Collective over the nodes."""
    set_environment(os.environ)
    place = LaunchedRank()
    try:
        place = find_place(os.environ)
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        plan = load_plan(path, overrides)
        data = open_checked(plan.config, device, place.rank == 0)
        store = rendezvous(place, facts(plan, data))
    except REFUSED as error:
        told = share_refusal(place, error)
        return _print([Finding("bad", "start", str(told))], place.rank if isinstance(told, Disagreement) else 0)
    opened = f"{plan.config.parallel.world} ranks, and their data can be read"
    findings = [Finding("ok", "config and data", opened), *_host(plan.config, place)]
    if store is None:
        alone = Finding("unknown", "other nodes", f"one process; `{ONE_PER_NODE}` asks all nodes of a job")
        return _print([*findings, alone])

    def body(watch: Watch) -> int:
        # SLURM's name of the node, else the host's.
        name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        nodes = visit(name, findings, device, watch)
        return _print([*_merged(nodes), *compare(nodes)], place.rank)

    return in_world(body, DEADLINE, device, (place, store))


def _host(config: Config, place: LaunchedRank) -> Iterator[Finding]:
    needs_gpus = config.run.device == "cuda" or (config.run.device == "auto" and torch.cuda.is_available())
    wanted = ceil_div(config.parallel.world, place.world) if needs_gpus else 0
    yield from host.versions()
    yield from host.limits(config.parallel.world, bool(wanted or nics(Path("/sys"))))
    yield from host.name_resolves()
    yield from host.disk(config.run.folder, checkpoint_bytes(config), config.run.keep_checkpoints)
    yield from gpus.gpus(wanted)
    yield from gpus.infiniband()
    yield from gpus.xids()
    if wanted and not torch.cuda.is_available():
        yield Finding("bad", "torch", f"{torch.__version__} sees no GPU", "install the CUDA build for this driver")


def checkpoint_bytes(config: Config) -> int:
    """Bytes of a checkpoint: FP32 master weights and two moments of every parameter."""
    moments = 2 * (BF16 if config.optim.moments == "bf16" else FP32)
    average = FP32 if config.optim.ema else 0
    return count_parameters(config.model, mtp=True)[0] * (FP32 + moments + average)


def _merged(nodes: Sequence[Node]) -> Iterator[Finding]:
    """One line for findings that are equal on all nodes, and one per node for the others."""
    seen: dict[Finding, list[str]] = {}
    for node in nodes:
        for finding in node.findings:
            seen.setdefault(finding, []).append(node.name)
    for finding, names in seen.items():
        where = f"all {len(nodes)} nodes" if len(names) == len(nodes) else ", ".join(names)
        if finding.verdict != "ok" or len(names) == len(nodes):
            yield finding._replace(what=f"{where}: {finding.what}")


def _print(findings: Sequence[Finding], rank: int = 0) -> int:
    """Print all nodes' findings, on the first node. Returns the exit code."""
    for finding in findings if rank == 0 else ():
        print(finding, flush=True)
    return int(any(finding.verdict == "bad" for finding in findings))
