"""The trainer itself on nodes with a slow link between them: steps with parallel.overlap off and on, in one run.

    sudo .venv/bin/python -m benchmarks.overlap.netns                # 2 nodes x 1 rank, then 2 x 2; about five minutes

Nodes are network namespaces (tests/support/netns_bed.py), each with a torchrun agent of its own, as on a cluster. All
ranks are one expert-parallel group, so every dispatch and combine crosses the link; DualPipeV on one pipeline rank
pairs F with B and has no bubble, so what differs between off and on is the overlap alone. Every rank trains two models,
one with overlap and one without, a step of each in turn on the same data: their losses must stay the same bits, and
whatever else the machine does falls on both. Figures are the trainer's own (`journal.MetricsRow`), medians over steps.
`wire` is the time that a node's link needs for a step's bytes. Compute is the step without what it stood still, overlap
off.

Experts are wider than configs/tiny_cpu.toml's, so that a layer's compute is spread over its phases as in a large model,
and microbatches larger, so that messages take longer than this machine's scheduling. With more ranks than cores a rank
that waits gives its core to one that computes: the machine overlaps what the schedule does not, and there is less to
gain.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from dryvine.comm.host import MALLOC
from dryvine.comm.topology import discover
from dryvine.trainer.data.splits import open_data
from dryvine.trainer.loop import Stop, one_step
from dryvine.trainer.ramps import points
from dryvine.trainer.rig import make_rig, mesh_of
from dryvine.trainer.run_plan import load_plan
from tests.support import netns_bed

ROOT = Path(__file__).parents[2]
WARM = 2  # first steps of a run, not counted
BURST = "48kb"  # the least with which tbf keeps its rate here; a larger one would carry half a message for nothing
WIDER = ("model.expert_ffn=384", "parallel.microbatch_sequences=2")
Rows = list[dict[str, Any]]


class Shape(NamedTuple):
    nodes: int
    ranks: int  # of a node

    @property
    def world(self) -> int:
        return self.nodes * self.ranks


def measure(shape: Shape, given: argparse.Namespace) -> dict[str, Rows]:
    """Every step that counts, by overlap: one torchrun agent per node, rank 0 writes."""
    environment = {**os.environ, **MALLOC, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    agents = []
    with netns_bed.nodes(shape.nodes, given.rate) as names, tempfile.TemporaryDirectory() as folder:
        for node, name in enumerate(names):
            tbf = ["root", "tbf", "rate", given.rate, "burst", BURST, "latency", "50ms"]
            subprocess.run(["tc", "-n", name, "qdisc", "replace", "dev", "eth0", *tbf], check=True)
            torchrun = [f"--nnodes={shape.nodes}", f"--nproc_per_node={shape.ranks}", f"--node_rank={node}"]
            torchrun += ["--master_addr=10.77.0.1", "--master_port=29578", "-m", __spec__.name, *sys.argv[1:]]
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *torchrun]
            agents.append(subprocess.Popen([*command, "--folder", folder], cwd=ROOT, env=environment))
        try:
            codes = [agent.wait(900) for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
        if any(codes):
            raise SystemExit("a node failed; see its words above")
        found: dict[str, Rows] = json.loads((Path(folder) / "rows.json").read_text())
    assert [row["loss"] for row in found["off"]] == [row["loss"] for row in found["on"]], "overlap changed the losses"
    return {overlap: rows[WARM:] for overlap, rows in found.items()}


def under_torchrun(given: argparse.Namespace) -> None:
    """One rank: a step without overlap, the same step with it, and so on; who goes first takes turns too."""
    world = int(os.environ["WORLD_SIZE"])
    plans = {overlap: load_plan(given.config, words(world, given, overlap)) for overlap in ("off", "on")}
    config = plans["on"].config
    data, topology = open_data(config), discover(world, config.comm.topology, os.environ)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    mesh = mesh_of(plans["on"], torch.device("cpu"))
    rigs = {overlap: make_rig(plan, mesh, data, topology) for overlap, plan in plans.items()}
    rows: dict[str, Rows] = {overlap: [] for overlap in rigs}
    for point in islice(points(config.batch, config.data.seq_len), config.run.steps):
        for overlap in sorted(rigs, reverse=point.step % 2 > 0):
            rows[overlap].append(asdict(one_step(rigs[overlap], point, Stop()).row))
    if mesh.rank == 0:
        (given.folder / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def words(world: int, given: argparse.Namespace, overlap: str) -> Sequence[str]:
    layout = (f"parallel.ep={world}", "parallel.pp=1", "parallel.schedule=dualpipev", f"parallel.overlap={overlap}")
    run = (f"run.steps={given.steps + WARM}", "run.eval_every=1000000", "run.eval_batches=1", 'run.device="cpu"')
    batch = (f"batch.sequences={8 * world}", f"comm.dispatcher={given.dispatcher}")
    return (*layout, *run, *batch, *WIDER, *given.set)


def summary(rows: dict[str, Rows], nodes: int, rate: float) -> dict[str, float]:
    """Medians over steps, in seconds; `faster` is the median over pairs of steps. `rate` is in bytes a second."""

    def middle(overlap: str, key: str) -> float:
        return statistics.median(row[key] for row in rows[overlap])

    seconds = {overlap: [row["seconds"] for row in rows[overlap]] for overlap in rows}
    gains = [off / on for off, on in zip(seconds["off"], seconds["on"], strict=True)]
    low, faster, high = statistics.quantiles(gains, n=4)
    figures = {"faster": faster, "low": low, "high": high}
    figures["wire"] = middle("on", "mbytes_between_nodes") * 1e6 / nodes / rate
    for overlap in rows:
        figures[overlap] = middle(overlap, "seconds")
        figures[f"exposed {overlap}"] = middle(overlap, "exposed_comm_ms") / 1e3
    figures["compute"] = figures["off"] - figures["exposed off"]
    return figures | {"paired": middle("on", "overlapped_share")}


def table(results: dict[Shape, dict[str, float]], given: argparse.Namespace) -> Table:
    title = f"{given.config.name}, {given.dispatcher} dispatcher, {given.rate} between nodes, {os.cpu_count()} cores"
    shown = Table(title=title, caption="seconds a step; the losses are the same bits; quartiles of off / on by step")
    columns = (
        "nodes",
        "compute",
        "wire",
        "paired F",
        "off",
        "on",
        "exposed off",
        "exposed on",
        "off / on",
        "quartiles",
    )
    for column in columns:
        shown.add_column(column, justify="right")
    for shape, r in results.items():
        seconds = (f"{r[key]:.2f}" for key in ("off", "on", "exposed off", "exposed on"))
        ends = (f"{r['faster']:.2f}x", f"{r['low']:.2f}-{r['high']:.2f}")
        name = f"{shape.nodes} x {shape.ranks}"
        shown.add_row(name, f"{r['compute']:.2f}", f"{r['wire']:.2f}", f"{r['paired']:.0%}", *seconds, *ends)
    return shown


def bytes_a_second(rate: str) -> float:
    return float(rate.removesuffix("mbit")) * 1e6 / 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/tiny_cpu.toml")
    parser.add_argument("--rate", default="200mbit", help="between nodes, in mbit")
    parser.add_argument("--dispatcher", default="flat", help="comm.dispatcher")
    parser.add_argument("--shapes", default="2x1,2x2", help="nodes x ranks of each")
    parser.add_argument("--steps", type=int, default=15, help="counted, of each model")
    parser.add_argument("--json", type=Path, help="write every step's figures there")
    parser.add_argument("--set", action="append", default=[], help="another override, table.key=value")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if "RANK" in os.environ:
        return under_torchrun(given)
    if lacking := netns_bed.missing():
        raise SystemExit(lacking)
    console, results, every = Console(width=110), {}, {}
    for text in given.shapes.split(","):
        shape = Shape(*map(int, text.split("x")))
        with console.status(f"{text}: {given.steps + WARM} steps of both"):
            every[text] = measure(shape, given)
        results[shape] = summary(every[text], shape.nodes, bytes_a_second(given.rate))
    console.print(f"load average {os.getloadavg()[0]:.1f}")
    console.print(table(results, given))
    if given.json:
        given.json.write_text(json.dumps(every, indent=1))


if __name__ == "__main__":
    main()
