"""What ran on a device, by kind, read from a trace that torch.profiler wrote.

A kernel belongs to the span (a `record_function` of the host) in which it was launched, whichever thread launched it,
so the kernels of a backward, which autograd launches from a thread of its own, find their phase too. The kind follows
from the name; names that no pattern knows come out as "unclassified", by name, so that nothing hides in "other".

A CPU has no kernels: there the own time of torch's operators, without that of those they call, stands for them.
"""

from __future__ import annotations

import gzip
import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {
    "attention core": r"flash|fmha|sdpa|cudnn_generated|scaled_dot_product|dot_do_o|convert_dq",
    "norms": r"^norm_weight_kernel|rms_?norm|layer_?norm|GammaBeta",
    "casts": r"^(rows|columns|turn|blocks|pack|unpack|swiglu|swiglu_backward)_kernel",
    "GEMM in FP32": r"sgemm|simt|gemm\w*_f32f32_f32f32",
    "GEMM": r"gemm|nvjet|cutlass|xmma|cublas|splitk|^product_kernel|^wgrad_kernel|grouped_mm|^aten::(\w*mm\w*|linear)$",
    "permutation": r"index|gather|scatter|sort|top_?k|embedding_?bag|histogram|bincount|scan|cumsum|repeat_interleave"
    r"|^(sum|tally|place|arrive)_kernel",
    "copies": r"copy|CatArray|memcpy|memset|fill|^aten::(cat|zeros?_?|empty\w*|clone|contiguous|to)$",
    "elementwise": r"elementwise|reduce|triton_|^aten::"
    r"|^(gate|gate_backward|balance|gated|gated_backward|heads|heads_backward|logsumexp|logits_gradient)_kernel",
}  # the first that matches, so what is special comes before what is common
UNKNOWN = "unclassified"
DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


@dataclass(frozen=True)
class Kernel:
    """Times in microseconds of the trace's clock. `span` is where it was launched, "" outside all of them."""

    name: str
    start: float
    duration: float
    span: str

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    @property
    def short(self) -> str:
        """Without what every name of its sort has."""
        return re.sub(r"^void |at::native::|\(anonymous namespace\)::|c10::", "", self.name)[:96]


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), UNKNOWN)


def read(path: Path, spans: Iterable[str]) -> list[Kernel]:
    """The kernels of a Chrome trace (.json or .json.gz) by start; `spans` are names of `record_function` spans, which
    must not overlap each other."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    wanted = set(spans)
    marks = [event for event in events if event["cat"] == "user_annotation" and event["name"] in wanted]
    where = _Spans(sorted((mark["ts"], mark["ts"] + mark["dur"], mark["name"]) for mark in marks))
    found = _on_device(events, where) or _on_host(events, where)
    return sorted(found, key=lambda kernel: kernel.start)


@dataclass(frozen=True)
class _Spans:
    each: Sequence[tuple[float, float, str]]  # start, end, name; by start

    def at(self, time: float) -> str:
        i = bisect_right(self.each, time, key=lambda span: span[0]) - 1
        return self.each[i][2] if i >= 0 and time <= self.each[i][1] else ""


def _on_device(events: list[dict[str, Any]], where: _Spans) -> list[Kernel]:
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    ran = [event for event in events if event["cat"] in DEVICE]
    return [
        Kernel(e["name"], e["ts"], e["dur"], where.at(launched.get(e["args"].get("correlation"), -1.0))) for e in ran
    ]


def _on_host(events: list[dict[str, Any]], where: _Spans) -> list[Kernel]:
    """Operators with their own time: what their children took is taken off, thread by thread."""
    threads = defaultdict(list)
    for event in events:
        if event["cat"] == "cpu_op":
            threads[event["tid"]].append(event)
    found = []
    for thread in threads.values():
        open_: list[tuple[float, dict[str, float]]] = []  # end, and a box for the time that is left
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while open_ and open_[-1][0] <= event["ts"]:
                open_.pop()
            if open_:
                open_[-1][1]["own"] -= event["dur"]
            box = {"own": event["dur"]}
            open_.append((event["ts"] + event["dur"], box))
            found.append((event, box))
    own = [(event, box) for event, box in found if event["name"].startswith("aten::")]  # the rest is the host's
    return [Kernel(e["name"], e["ts"], max(box["own"], 0.0), where.at(e["ts"])) for e, box in own]


def busy(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one of them ran: the length of the union, streams side by side counted once."""
    total, reached = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda k: k.start):
        end = kernel.start + kernel.duration
        total += max(0.0, end - max(kernel.start, reached))
        reached = max(reached, end)
    return total


def by_kind(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Microseconds of each kind that occurs, in the order of KINDS."""
    sums: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        sums[kernel.kind] += kernel.duration
    return {kind: sums[kind] for kind in (*KINDS, UNKNOWN) if kind in sums}


def largest(kernels: Iterable[Kernel], count: int = 10) -> list[tuple[str, str, int, float]]:
    """(short name, kind, how often, microseconds together) of the names that took longest."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kernel in kernels:
        times[kernel.short, kernel.kind].append(kernel.duration)
    rows = [(name, kind, len(each), sum(each)) for (name, kind), each in times.items()]
    return sorted(rows, key=lambda row: -row[3])[:count]
