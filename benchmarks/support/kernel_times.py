"""What ran on a device, by kind, read from a trace that torch.profiler wrote.

A kernel belongs to the span (a `record_function` of the host) in which it was launched, whichever thread launched it,
so the kernels of a backward, which autograd launches from a thread of its own, find their phase too. The kind follows
from the name; names that no pattern matches are listed as "unclassified", so that nothing hides in "other".

A CPU has no kernels: there an operator of torch counts as one, with its own time, without that of operators it calls.
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

# A kind is the first whose pattern matches, so what is special comes before what is common.
KINDS = {
    "attention core": r"flash|fmha|sdpa|cudnn_generated|scaled_dot_product|dot_do_o|convert_dq",
    "norms": r"^norm_backward_kernel|rms_?norm|layer_?norm|GammaBeta",
    "casts": r"^(rows|columns|transpose|blocks|transpose_blocks|pack|unpack|swiglu|swiglu_backward)_kernel",
    "GEMM in FP32": r"sgemm|simt|gemm\w*_f32f32_f32f32",
    "GEMM": r"gemm|nvjet|cutlass|xmma|cublas|splitk|^product_kernel|^wgrad_kernel|grouped_mm|^aten::(\w*mm\w*|linear)$",
    "permutation": r"index|gather|scatter|sort|top_?k|embedding_?bag|histogram|bincount|scan|cumsum|repeat_interleave"
    r"|^(sum|tally|place|arrive|tables)_kernel",
    "copies": r"copy|CatArray|memcpy|memset|fill|^aten::(cat|zeros?_?|empty\w*|clone|contiguous|to)$",
    "elementwise": r"elementwise|reduce|triton_|^aten::"
    r"|^(adamw|gate|gate_backward|balance|gated|gated_backward|heads|heads_backward|logsumexp|logits_gradient)_kernel",
}
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
        """The name without the prefixes that all of its sort have."""
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
    kernels = _on_device(events, where) or _on_host(events, where)
    return sorted(kernels, key=lambda kernel: kernel.start)


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
    """Operators with their own time: without that of the operators they call, on each thread."""
    threads = defaultdict(list)
    for event in events:
        if event["cat"] == "cpu_op":
            threads[event["tid"]].append(event)
    own: dict[int, float] = {}
    for thread in threads.values():
        # Operators that have begun and not ended at the next one's start, outermost first.
        parents: list[dict[str, Any]] = []
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while parents and parents[-1]["ts"] + parents[-1]["dur"] <= event["ts"]:
                parents.pop()
            if parents:
                own[id(parents[-1])] -= event["dur"]
            own[id(event)] = event["dur"]
            parents.append(event)
    # Operators of torch; other entries are the host's.
    operators = [e for thread in threads.values() for e in thread if e["name"].startswith("aten::")]
    return [Kernel(e["name"], e["ts"], max(own[id(e)], 0.0), where.at(e["ts"])) for e in operators]


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
