"""`dryvine bench comm`: dispatch and combine by backend, tokens and dtype, beside what the links could do.

Each case is timed from a barrier until the last rank is done, and backends take turns round by round, so that other
work on the machine slows all of them alike. `plain` is one bare all_to_all_single of the bytes that the backend sends,
with no permutation around it: what the transport can do.

Logical bandwidth is rows x experts chosen x row bytes over time (what the model asked for); wire bandwidth is what was
sent over links over time. A backend that sends each row once per node can have a logical bandwidth above its link's.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dryvine.comm.dispatch.backends import BACKENDS
from dryvine.comm.host import available_memory
from dryvine.comm.topology import Topology, TopologyConfig, discover
from dryvine.launch.options import Experts, TopK, numbers, used_experts
from dryvine.trainer.config import ConfigError
from dryvine.trainer.data.atomic import CannotWrite

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, device

    from dryvine.comm.dispatch.api import AnyDispatcher
    from dryvine.comm.mesh import Mesh

Names = Annotated[str, typer.Option(help="backends, by comma")]
Nodes = Annotated[str, typer.Option(help="CPU ranks on each node, e.g. 2,2; under torchrun: found")]
Tokens = Annotated[str, typer.Option(help="tokens per rank, by comma; 256,1024 and under torchrun 4096 too")]
Dtypes = Annotated[str, typer.Option(help="bf16, fp8 (values and a scale per 128)")]
DTYPES = ("bf16", "fp8")
PARTS = ("routing", "dispatch", "combine", "plain")
PICTURES = (".png", ".svg")
Out = Annotated[Path | None, typer.Option(help="where the plot goes (.png or .svg)")]


@dataclass(frozen=True)
class Case:
    """One measurement to make."""

    backend: str
    tokens: int
    dtype: str


@dataclass(frozen=True)
class CommFigure:
    """Seconds of one case on the slowest rank (median), by part, and bytes of one dispatch of this rank."""

    case: Case
    ranks: int
    seconds: dict[str, float]  # routing, dispatch, combine, and plain: a bare all_to_all_single of dispatch's bytes
    logical: int  # bytes that dispatch delivers
    intra: int  # bytes that it sends inside the node
    inter: int  # bytes that it sends between nodes


@dataclass(frozen=True)
class CommShape:
    """What all cases share."""

    hidden: int
    experts: int
    top_k: int
    rounds: int


def comm(
    backends: Names = "flat,hierarchical",
    nodes: Nodes = "2,2",
    tokens: Tokens = "",
    dtypes: Dtypes = "bf16,fp8",
    hidden: Annotated[int, typer.Option(min=1, help="width of a token")] = 7168,
    experts: Experts = 64,
    top_k: TopK = None,
    rounds: Annotated[int, typer.Option(min=1, help="of each measurement; the median counts")] = 5,
    out: Out = None,
) -> None:
    """Time dispatch and combine on CPU ranks of this machine, or on the ranks that torchrun started."""
    from rich.console import Console

    shape = CommShape(hidden, experts, used_experts(top_k, experts), rounds)
    tokens = tokens or ("256,1024,4096" if "RANK" in os.environ else "256,1024")
    sizes = numbers("--tokens", tokens, "tokens a rank")
    kinds, named = _listed("--dtypes", dtypes, DTYPES), _listed("--backends", backends, BACKENDS)
    if "fp8" in kinds and hidden % 128:
        raise ConfigError(f"--hidden {hidden}: FP8 has a scale for each 128 values; give a multiple, or --dtypes bf16")
    if out and (out.suffix not in PICTURES or not out.parent.is_dir()):
        raise ConfigError(f"--out {out}: give a file that ends with {' or '.join(PICTURES)}, in a folder that exists")
    cases = [Case(b, t, d) for d in kinds for t in sizes for b in named]
    figures, topology = _under_torchrun(shape, cases) if "RANK" in os.environ else _here(shape, cases, nodes)
    if int(os.environ.get("RANK", 0)) == 0:
        Console(highlight=False).print(times(figures), rates(figures, topology))
        if out:
            plot(figures, topology, out)


def _listed(option: str, text: str, known: Collection[str]) -> list[str]:
    """The names in an option. Raises ConfigError for one that there is not."""
    names = text.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f"{option} {text}: no {name!r}; there are {', '.join(known)}")
    return names


def _here(shape: CommShape, cases: list[Case], nodes: str) -> tuple[list[CommFigure], Topology]:
    from dryvine.comm.host import MALLOC
    from dryvine.comm.local import run

    os.environ.update(MALLOC)
    config = TopologyConfig(nodes=numbers("--nodes", nodes, "the ranks on each node"), inter="loopback")
    topology = discover(sum(config.nodes), config, {})
    _check_ranks(shape, cases, topology.ranks)
    _check_memory(topology.ranks, shape, max(case.tokens for case in cases))
    return run(measure, topology.ranks, topology, shape, cases, deadline=3600)[0], topology


# Peak memory of a rank, in multiples of the BF16 bytes of its dispatched rows: 7 to 10 were measured.
COPIES = 10


def _check_ranks(shape: CommShape, cases: list[Case], ranks: int) -> None:
    """Raise ConfigError or LibraryMissing if so many ranks cannot share the experts, or use a backend."""
    from dryvine.comm.dispatch.choose import check_library

    if shape.experts % ranks:
        raise ConfigError(f"--experts {shape.experts}: they do not divide over {ranks} ranks; give a multiple")
    for name in {case.backend for case in cases}:
        check_library(name, ranks)


def _check_memory(ranks: int, shape: CommShape, tokens: int) -> None:
    """Exit if the ranks would need more memory than is free: the kernel would kill some process, perhaps another."""
    needed = COPIES * ranks * tokens * shape.top_k * shape.hidden * 2
    free = available_memory()
    if needed > free:
        here = f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free here"
        typer.echo(f"dryvine: {ranks} ranks of {tokens} tokens take about {here}: set --tokens or --hidden", err=True)
        raise typer.Exit(2)


def _under_torchrun(shape: CommShape, cases: list[Case]) -> tuple[list[CommFigure], Topology]:
    import torch
    import torch.distributed as dist

    from dryvine.comm.nvml import probe, refined
    from dryvine.comm.world import backend

    _check_ranks(shape, cases, int(os.environ["WORLD_SIZE"]))
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend("cuda" if cuda else "cpu"))
    topology = refined(discover(dist.get_world_size(), TopologyConfig(), os.environ), probe())
    figures = measure(dist.get_rank(), topology, shape, cases)
    dist.destroy_process_group()
    return figures, topology


def measure(rank: int, topology: Topology, shape: CommShape, cases: list[Case]) -> list[CommFigure]:
    """The timings of all cases; runs on every rank."""
    import torch

    from dryvine.comm.dispatch.choose import make_dispatcher
    from dryvine.comm.dispatch.setup import Setup
    from dryvine.comm.mesh import Layout, make_mesh

    place = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    mesh = make_mesh(Layout(ep=topology.ranks), place, timedelta(seconds=600))
    names = dict.fromkeys(case.backend for case in cases)
    most, row = max(case.tokens for case in cases), 2 * shape.hidden
    setup = Setup(shape.experts, mesh, topology, top_k=shape.top_k, tokens=most, row_bytes=row)
    dispatchers = {name: make_dispatcher(name, setup) for name in names}
    return [_measured(case, shape, dispatchers[case.backend], mesh) for case in cases]


def _measured(case: Case, shape: CommShape, dispatcher: AnyDispatcher, mesh: Mesh) -> CommFigure:
    import torch

    place = mesh.device
    generator = torch.Generator().manual_seed(mesh.rank)
    chosen = torch.rand(case.tokens, shape.experts, generator=generator).topk(shape.top_k).indices.to(place)
    payload = _payload(case, shape.hidden, place)
    weights = torch.rand(case.tokens, shape.top_k, device=place)
    handle = dispatcher.plan_routing(chosen).wait()
    back = torch.zeros(sum(handle.counts), shape.hidden, dtype=torch.bfloat16, device=place)
    dispatcher.meter.take()
    dispatcher.dispatch(payload, weights, handle).wait()
    sent = dispatcher.meter.take()
    intra, inter = sent.get("intra", 0), sent.get("inter", 0)
    seconds = _turns(
        {
            "routing": lambda: dispatcher.plan_routing(chosen).wait(),
            "dispatch": lambda: dispatcher.dispatch(payload, weights, handle).wait(),
            "combine": lambda: dispatcher.combine(back, None, handle).wait(),
            "plain": _plain((intra + inter) // mesh.size, mesh.size, place),
        },
        shape.rounds,
        place,
    )
    logical = case.tokens * shape.top_k * sum(t[0].nbytes for t in payload)
    return CommFigure(case, mesh.size, seconds, logical, intra, inter)


def _payload(case: Case, hidden: int, place: device) -> tuple[Tensor, ...]:
    import torch

    if case.dtype == "bf16":
        return (torch.zeros(case.tokens, hidden, dtype=torch.bfloat16, device=place),)
    values = torch.zeros(case.tokens, hidden, dtype=torch.uint8, device=place)
    return values, torch.ones(case.tokens, hidden // 128, device=place)


def _plain(each: int, ranks: int, place: device) -> Callable[[], None]:
    """An all-to-all that sends `each` bytes to every rank: the largest `each` of all ranks, so that they exchange
    equally much."""
    import torch
    import torch.distributed as dist

    largest = torch.tensor([each], device=place)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    out = torch.zeros(int(largest) * ranks // 8 + ranks, dtype=torch.int64, device=place)
    out = out[: len(out) // ranks * ranks]
    back = torch.empty_like(out)

    def exchange() -> None:
        dist.all_to_all_single(back, out)

    return exchange


def _turns(runs: dict[str, Callable[[], object]], rounds: int, place: device) -> dict[str, float]:
    """Median seconds of each run, interleaved over the rounds; the first round is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, fn in runs.items():
            times[name].append(_timed(fn, place))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def _timed(fn: Callable[[], object], place: device) -> float:
    import torch
    import torch.distributed as dist

    dist.barrier()
    start = time.perf_counter()
    fn()
    if place.type == "cuda":
        torch.cuda.synchronize()
    seconds = torch.tensor([time.perf_counter() - start], device=place)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def times(figures: list[CommFigure]) -> Table:
    """A row per case: milliseconds of each part, and dispatch beside a plain all-to-all of its bytes."""
    from rich.table import Table

    made = Table("backend", "dtype", "tokens", *PARTS, "of plain", title=f"ms, EP {figures[0].ranks}", padding=(0, 0))
    for f in figures:
        parts = [f"{1000 * f.seconds[part]:.1f}" for part in PARTS]
        of_plain = f"{f.seconds['plain'] / f.seconds['dispatch']:.2f}"
        made.add_row(f.case.backend, f.case.dtype, str(f.case.tokens), *parts, of_plain)
    return made


def rates(figures: list[CommFigure], topology: Topology) -> Table:
    """A row per case: GB/s of dispatch; the last row is what the links could do."""
    from rich.table import Table

    made = Table("backend", "dtype", "tokens", "logical", topology.intra.kind, topology.inter.kind, title="GB/s a rank")
    for f in figures:
        rate = [f"{size / f.seconds['dispatch'] / 1e9:.2f}" for size in (f.logical, f.intra, f.inter)]
        made.add_row(f.case.backend, f.case.dtype, str(f.case.tokens), *rate)
    made.add_section()
    made.add_row("limit", "", "", "", f"{topology.intra.gigabytes:g}", f"{topology.inter.gigabytes:g}")
    return made


def plot(figures: list[CommFigure], topology: Topology, out: Path) -> None:
    """Time by tokens, and wire bandwidth with each link's limit."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(11, 4.5), layout="constrained")
    left, right = canvas.subplots(1, 2)
    for backend, dtype in dict.fromkeys((f.case.backend, f.case.dtype) for f in figures):
        line = [f for f in figures if (f.case.backend, f.case.dtype) == (backend, dtype)]
        line.sort(key=lambda f: f.case.tokens)
        tokens, label = [f.case.tokens for f in line], f"{backend} {dtype}"
        both = [1000 * (f.seconds["dispatch"] + f.seconds["combine"]) for f in line]
        left.plot(tokens, both, marker="o", label=label)
        right.plot(tokens, [f.inter / f.seconds["dispatch"] / 1e9 for f in line], marker="o", label=label)
    right.axhline(topology.inter.gigabytes, linestyle="--", color="grey", label=f"{topology.inter.kind} limit")
    left.set(xlabel="tokens per rank", ylabel="dispatch + combine, ms", xscale="log", yscale="log")
    right.set(xlabel="tokens per rank", ylabel="between nodes, GB/s per rank", xscale="log", yscale="log")
    for axes in (left, right):
        axes.legend()
    with CannotWrite.naming(out):
        canvas.savefig(out)
