"""Tokens per second, hit rate and resident memory of demand-paged experts, against the cap.

    python -m benchmarks.paged --out docs/figures/paged-experts.svg

A random model of 1.4 GB of BF16 experts (7 mixtures of 128, 4 chosen) is written, and answers one request in FP32, in a
process of its own for each cap: in BF16 the two ways to multiply round differently, and random logits are near ties.
This process reads /proc/PID/smaps_rollup of that one, before the experts are opened, when it has answered one request
to another, tiny model, and while it decodes. Random gates are the worst case: they ask for any expert at any time, and
the guess for the next layer is poor.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dryvine.comm.dispatch.single_rank import SingleRank
from dryvine.launch.pages.plots import Curve, lines
from dryvine.trainer.generate.open import load, open_weights
from dryvine.trainer.generate.paged import ExpertPages, paged_experts
from dryvine.trainer.generate.requests import Request
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.hand_off.hf_config import config_json
from dryvine.trainer.hand_off.names import places
from dryvine.trainer.hand_off.safetensors_file import SafetensorsWriter
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.shape import Shape, blocks
from dryvine.trainer.model.spec import Spec

SHAPE = Shape(
    layers=8, first_dense=1, hidden=512, ffn=1024, expert_ffn=512, heads=8, q_lora=128, kv_lora=64, nope_dim=32,
    rope_dim=16, v_dim=32, routed=128, shared=1, top_k=4, groups=1, group_limit=1, score="sigmoid", normalise=True,
    vocab=512, max_position=256,
)  # fmt: skip
CPU = torch.device("cpu")


def write(folder: Path) -> int:
    """The model in BF16. Returns the bytes of its experts."""
    (folder / "config.json").write_text(json.dumps(config_json(SHAPE)))
    every = list(places(SHAPE))
    generator = torch.Generator().manual_seed(0)
    # Windows of one run of random numbers: a new one for each weight would take most of the time.
    numbers = (torch.randn(1 << 23, generator=generator) * 0.05).bfloat16()
    biases = {p.theirs for p in every if p.theirs.endswith("bias")}
    sizes = {p.theirs: (torch.float32 if p.theirs in biases else torch.bfloat16, p.shape) for p in every}
    with SafetensorsWriter(folder / "model.safetensors", sizes) as file:
        for place in every:
            first = int(torch.randint(len(numbers) - place.elements, (1,), generator=generator))
            values = numbers[first : first + place.elements].view(place.shape)
            values = torch.ones(place.shape) if len(place.shape) == 1 else values
            values = torch.zeros(place.shape) if place.theirs in biases else values
            file.write(place.theirs, 0, values.to(sizes[place.theirs][0]))
    return sum(2 * place.elements for place in every if ".experts." in place.ours)


def answer_with_another() -> None:
    """One request to a model of 0.3 MB: torch reads 9 MB of its own code when operators are first used."""
    few = {"layers": 2, "hidden": 64, "ffn": 64, "expert_ffn": 32, "q_lora": 32, "kv_lora": 32, "routed": 8}
    shape = SHAPE.model_copy(update=few)
    model = Model(Spec(shape, torch.float32, CPU), {0: tuple(b.name for b in blocks(shape))}, SingleRank(shape.routed))
    model.initialise(0)
    list(Sampler.alone(model).generate([Request((1, 2, 3), 4)]))


def child(folder: str, cap: int, new: int) -> None:
    """Answers one request; says when the experts are about to be opened, and waits for the word to go on."""
    torch.set_num_threads(1)
    source = open_weights(folder)
    model = load(source, torch.float32, CPU, lambda *_: None, experts=not cap)
    warm = Sampler.alone(model) if not cap else None
    answer_with_another()
    print("ready", flush=True)
    sys.stdin.readline()
    pages = ExpertPages(source, torch.float32, cap) if cap else None
    sampler = warm or Sampler.alone(model, experts=paged_experts(model, pages))  # type: ignore[arg-type]
    started = time.perf_counter()
    (completion,) = sampler.generate([Request((1, 2, 3), new, temperature=0.0)])
    seconds = time.perf_counter() - started
    row = {"tokens": completion.tokens.tolist(), "rate": new / seconds, "hit_rate": 1.0, "read": 0}
    if pages:
        row |= {"hit_rate": pages.figures.hit_rate, "read": pages.figures.bytes_read}
    print(json.dumps(row), flush=True)


def resident(pid: int) -> int:
    """Bytes."""
    found = re.search(r"Rss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())
    return 1024 * int(found[1]) if found else 0


def measure(folder: str, cap: int, new: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.paged", "--child", folder, "--cap", str(cap), "--new", str(new)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        before = peak = resident(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        while process.poll() is None:
            try:
                peak = max(peak, resident(process.pid))
            except OSError:
                break
            time.sleep(0.01)
        row: dict[str, Any] = json.loads(process.stdout.readline())
    row |= {"cap": cap, "resident": peak - before, "within": peak - before <= 1.15 * cap}
    # Rows of a run that somebody ends are not lost.
    print(json.dumps({name: value for name, value in row.items() if name != "tokens"}), file=sys.stderr, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caps", nargs="+", type=int, default=[100, 200, 300, 600, 1200], help="MB")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cap", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.cap, args.new)
    with tempfile.TemporaryDirectory() as folder:
        experts = write(Path(folder))
        whole = measure(folder, 0, args.new)
        rows = [measure(folder, cap * 10**6, args.new) for cap in args.caps]
    for row in rows:
        row["same_tokens"] = row.pop("tokens") == whole["tokens"]
    print(json.dumps({"experts": experts, "unpaged_rate": whole["rate"], "rows": rows}, indent=2))
    if args.out:
        caps = [row["cap"] / 1e6 for row in rows]
        curves = {
            "hit rate": Curve(caps, [row["hit_rate"] for row in rows]),
            "tokens/s, of unpaged": Curve(caps, [row["rate"] / whole["rate"] for row in rows]),
        }
        args.out.write_text(lines(curves, f"cap, MB of {experts / 1e6:.0f}", "share"))


if __name__ == "__main__":
    main()
