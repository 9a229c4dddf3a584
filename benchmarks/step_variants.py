"""Whole steps on one GPU with one setting changed at a time: document masks, and the optimizer in host memory.

    python -m benchmarks.step_variants [--deadline 150] [--out steps.json] [table.key=value ...]

The model of configs/moe_1b.toml with fewer layers, on documents of a few hundred tokens. Each variant runs in a process
of its own, one after the other; medians of five steps. Beside them is what `dryvine plan` predicts for `run.hardware`:
the device's peak memory, bytes in host memory, and the step. Steps are timed with CUDA graphs and without.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.support.timed_steps import timed
from dryvine.comm.local import RankFailed
from dryvine.launch.plan.hardware import load_hardware
from dryvine.launch.plan.plan import make
from dryvine.trainer.config import Config, load
from dryvine.trainer.data.build import build
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.spec import BuildSpec
from dryvine.trainer.run_plan import make_plan

CONFIG = Path(__file__).parents[1] / "configs" / "moe_1b.toml"
SMALLER = (
    "model.layers=6", "run.device=cuda", "batch.sequences=32", "data.vocab_size=320", "parallel.microbatch_sequences=8",
)  # fmt: skip
VARIANTS = {
    "plain": (),
    "plain, no graphs": ("parallel.graphs=off",),
    "documents": ("data.mask=document", "parallel.graphs=on"),
    "documents, no graphs": ("data.mask=document", "parallel.graphs=off"),
    "offload": ("optim.offload=cpu",),
}
CHARACTERS = 1500  # of a document


@dataclass(frozen=True)
class Row:
    """Seconds, and bytes on the device and in host memory."""

    seconds: float
    planned_seconds: float
    peak: int
    planned_peak: int
    planned_host: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--deadline", type=float, default=150, help="seconds for all variants together")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    ends, found = time.monotonic() + given.deadline, {}
    with tempfile.TemporaryDirectory() as folder:
        data = corpus(Path(folder))
        for name in given.variants:
            words = [*SMALLER, f'data.source="{data}"', f'run.out="{folder}"', *given.overrides, *VARIANTS[name]]
            try:
                found[name] = measure(load(CONFIG, words), ends - time.monotonic())
            except RankFailed as error:
                print(f"{name}: {error}", flush=True)
    show(found)
    if given.out:
        given.out.write_text(json.dumps({name: asdict(row) for name, row in found.items()}, indent=1) + "\n")


def corpus(folder: Path) -> Path:
    """A dataset of short pieces of standard library files."""
    texts = [path.read_text(errors="replace") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))]
    pieces = [text[i : i + CHARACTERS] for text in texts for i in range(0, len(text), CHARACTERS)]
    (folder / "pieces.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    build(match_files([str(folder / "pieces.jsonl")]), BuildSpec(vocab_size=320), folder / "pieces")
    return folder / "pieces"


def measure(config: Config, seconds: float) -> Row:
    """Raises RankFailed, also if it takes longer than that."""
    steps, memory = timed(config, (config.batch.sequences,), seconds)
    plan = make(make_plan(config), load_hardware(config.run.hardware or "h100"))
    taken = steps[config.batch.sequences].seconds
    print(f"{taken:.3f} s a step, peak {memory.peak / 1e9:.2f} GB", flush=True)
    return Row(taken, plan.step_seconds, memory.peak, plan.fullest.total, plan.fullest.on_host)


def show(found: dict[str, Row]) -> None:
    table = Table("", "step, ms", "of plain", "planned", "peak, GB", "planned", "off by", "in host memory, GB")
    plain = found.get("plain", next(iter(found.values()), None))
    for name, row in found.items():
        assert plain is not None
        table.add_row(
            name, f"{1e3 * row.seconds:,.0f}", f"{row.seconds / plain.seconds:.2f}",
            f"{1e3 * row.planned_seconds:,.0f}", f"{row.peak / 1e9:.2f}", f"{row.planned_peak / 1e9:.2f}",
            f"{row.peak / row.planned_peak - 1:+.1%}", f"{row.planned_host / 1e9:.2f}",
        )  # fmt: skip
    console = Console(width=120)
    console.print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")
    console.print(table)


if __name__ == "__main__":
    main()
