"""The trainer itself on nodes with a slow link between them: steps with parallel.overlap off and on, in one run.

    sudo .venv/bin/python benchmarks/overlap_netns.py                # 2 nodes x 1 rank, then 2 x 2; five minutes

Nodes are network namespaces (tests/netns_bed.py), each with a torchrun agent of its own, as on a cluster. All ranks are
one expert-parallel group, so every dispatch and combine crosses the link; DualPipeV on one pipeline rank pairs F with B
and has no bubble, so what differs between off and on is the overlap alone. Runs take turns (off, on, off, on, ...), so
that whatever else the machine does falls on both. Seconds are medians over the steps of all turns; `link` is the time
that a node's link is busy in a step, bytes over rate; `compute` is the step without what it stood still.

With more ranks than cores a rank that waits gives its core to one that computes, so the machine overlaps what the
schedule does not, and there is less to gain.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track as progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from dryvine.comm.host import MALLOC
from tests import netns_bed

ROOT = Path(__file__).parent.parent
BURST = "48kb"  # the least with which tbf keeps its rate here; a larger one would carry half a message for nothing
WARM = 2  # first steps of a turn, not counted
Rows = list[dict[str, Any]]


class Shape(NamedTuple):
    nodes: int
    ranks: int  # of a node

    @property
    def world(self) -> int:
        return self.nodes * self.ranks


def turn(names: list[str], shape: Shape, words: list[str], out: Path) -> Rows:
    """Train once, one torchrun agent per node; the rows of its metrics.jsonl."""
    environment = {**os.environ, **MALLOC, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    agents = []
    for node, name in enumerate(names):
        torchrun = [f"--nnodes={shape.nodes}", f"--nproc_per_node={shape.ranks}", f"--node_rank={node}"]
        torchrun += ["--master_addr=10.77.0.1", "--master_port=29578", "-m", "dryvine.trainer"]
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *torchrun, *words]
        agents.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL))
    try:
        codes = [agent.wait(400) for agent in agents]
        if any(codes):
            raise SystemExit("a node failed; see its words above")
    finally:
        for agent in agents:
            agent.kill()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def measure(shape: Shape, given: argparse.Namespace) -> dict[str, Rows]:
    """Every step that counts, by overlap. The losses must be the same bits."""
    found: dict[str, Rows] = {"off": [], "on": []}
    losses: dict[str, list[float]] = {}
    with netns_bed.nodes(shape.nodes, given.rate) as names, tempfile.TemporaryDirectory() as folder:
        for name in names:
            shape_ = ["root", "tbf", "rate", given.rate, "burst", BURST, "latency", "50ms"]
            subprocess.run(["tc", "-n", name, "qdisc", "replace", "dev", "eth0", *shape_], check=True)
        for number in progress(range(2 * given.turns), f"{shape.nodes} x {shape.ranks}"):
            overlap = ("off", "on")[number % 2]
            where = [f"run.name={overlap}{number}", f'run.out="{folder}"']
            rows = turn(names, shape, [*words(shape, given), f"parallel.overlap={overlap}", *where],
                        Path(folder) / f"{overlap}{number}")  # fmt: skip
            found[overlap] += rows[WARM:-1]  # the last one also evaluates
            losses[overlap] = [row["loss"] for row in rows]
    assert losses["off"] == losses["on"], "overlap changed the losses"
    return found


def words(shape: Shape, given: argparse.Namespace) -> list[str]:
    layout = ["parallel.pp=1", f"parallel.ep={shape.world}", "parallel.schedule=dualpipev"]
    steps = [f"run.steps={given.steps + WARM + 1}", "run.eval_every=1000", f"batch.sequences={4 * shape.world}"]
    return [str(given.config), *layout, *steps, f"comm.dispatcher={given.dispatcher}", *given.set]


def summary(shape: Shape, rows: Rows, rate: float) -> dict[str, float]:
    """Medians over steps, in seconds. `rate` is the link's in bytes a second."""
    middle = {key: statistics.median(row[key] for row in rows) for key in ("seconds", "exposed_comm_ms")}
    link = statistics.median(row["mbytes_between_nodes"] for row in rows) * 1e6 / shape.nodes / rate
    exposed = middle["exposed_comm_ms"] / 1e3
    spread = statistics.quantiles([row["seconds"] for row in rows], n=4)
    return {"seconds": middle["seconds"], "exposed": exposed, "link": link, "low": spread[0], "high": spread[2]}


def table(results: dict[Shape, dict[str, dict[str, float]]], given: argparse.Namespace) -> Table:
    title = f"{given.config.name}, {given.dispatcher} dispatcher, {given.rate} between nodes, {os.cpu_count()} cores"
    shown = Table(title=title, caption="same losses, bit for bit")
    for column in ("nodes", "overlap", "step s", "quartiles", "exposed s", "of link", "compute:link", "faster"):
        shown.add_column(column, justify="right")
    for shape, by in results.items():
        compute = by["off"]["seconds"] - by["off"]["exposed"]
        for overlap, r in by.items():
            took = (f"{r['seconds']:.3f}", f"{r['low']:.2f}-{r['high']:.2f}")
            ratio, gain = compute / r["link"], by["off"]["seconds"] / r["seconds"]
            exposed = (f"{r['exposed']:.3f}", f"{r['exposed'] / r['link']:.0%}")
            shown.add_row(f"{shape.nodes} x {shape.ranks}", overlap, *took, *exposed, f"{ratio:.2f}", f"{gain:.2f}x")
    return shown


def bytes_a_second(rate: str) -> float:
    return float(rate.removesuffix("mbit")) * 1e6 / 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/tiny_cpu.toml")
    parser.add_argument("--rate", default="100mbit", help="between nodes, in mbit")
    parser.add_argument("--dispatcher", default="flat", help="comm.dispatcher")
    parser.add_argument("--shapes", default="2x1,2x2", help="nodes x ranks of each")
    parser.add_argument("--turns", type=int, default=3, help="runs with overlap off, and as many with it on")
    parser.add_argument("--steps", type=int, default=10, help="counted in each turn")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("set", nargs="*", help="more overrides, table.key=value")
    given = parser.parse_args()
    if lacking := netns_bed.missing():
        raise SystemExit(lacking)
    console, rate, results = Console(), bytes_a_second(given.rate), {}
    for words_ in given.shapes.split(","):
        shape = Shape(*map(int, words_.split("x")))
        results[shape] = {o: summary(shape, rows, rate) for o, rows in measure(shape, given).items()}
    console.print(f"load average {os.getloadavg()[0]:.1f}")
    console.print(table(results, given))
    if given.json:
        given.json.write_text(json.dumps({f"{s.nodes}x{s.ranks}": by for s, by in results.items()}, indent=1))


if __name__ == "__main__":
    main()
