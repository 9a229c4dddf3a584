"""Tokens per second beside transformers' generate, on the same weights, machine and threads, in one run.

    python -m benchmarks.generate --sequences 16 --out generate.json

With --dtype int8 our weights are in 8 bits (`dryvine generate --dtype int8`), those of transformers in FP32; the two
then choose other tokens. transformers runs with its KV cache, greedy, and with that of its implementations of experts
which is the fastest in a short trial. Both are given the same prompts and return the same tokens but for ties, of which
the share is told.
The two take turns, and the best of several rounds is compared, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.support.as_transformers import UnknownExperts, as_transformers
from dryvine.comm.dispatch.single_rank import SingleRank
from dryvine.trainer.generate.open import name_in_8_bits
from dryvine.trainer.generate.requests import Request
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.shape import Shape, blocks, count_parameters
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.tensors.int8 import Int8

TINY = Shape(
    layers=4, first_dense=1, hidden=128, ffn=256, expert_ffn=64, heads=4, q_lora=64, kv_lora=32, nope_dim=16,
    rope_dim=16, v_dim=32, routed=8, shared=1, top_k=2, groups=2, group_limit=1, score="sigmoid", normalise=True,
    vocab=25, max_position=256, init_std=0.1,
)  # fmt: skip
HUNDRED = Shape(
    layers=8, first_dense=1, hidden=512, ffn=1536, expert_ffn=256, heads=8, q_lora=256, kv_lora=128, nope_dim=64,
    rope_dim=32, v_dim=64, routed=32, shared=1, top_k=4, groups=4, group_limit=2, score="sigmoid", normalise=True,
    vocab=8192, max_position=512, init_std=0.04,
)  # fmt: skip
MODELS = {"1m": TINY, "100m": HUNDRED}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
ROUNDS = 3


def ours(shape: Shape, device: str, dtype: torch.dtype) -> Model:
    """Random weights."""
    names = tuple(block.name for block in blocks(shape))
    model = Model(Spec(shape, dtype, device), {0: names}, SingleRank(shape.routed))
    model.initialise(0)
    return model


def in_8_bits(model: Model) -> Model:
    """The same model with weights in 8 bits."""
    short = ours(model.spec.shape, "cpu", torch.float32)
    for name, weight in short.named_parameters():
        if name_in_8_bits(name):
            rows = weight.detach().flatten(0, -2)
            weight.int8 = Int8.empty(*rows.shape)
            weight.int8.write(0, rows)
    return short


def theirs(model: Model, implementation: str) -> Callable[[Tensor, int], Tensor]:
    """transformers' generate with the same weights: prompts [S, T] and how many new tokens -> [S, new]."""
    other = as_transformers(model, implementation).eval()

    def generate(prompts: Tensor, new: int) -> Tensor:
        with torch.no_grad():
            out = other.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return out[:, prompts.shape[1] :]

    return generate


def sampler_of(model: Model) -> Callable[[Tensor, int], Tensor]:
    sampler = Sampler.alone(model)

    def generate(prompts: Tensor, new: int) -> Tensor:
        requests = [Request(tuple(row), new, temperature=0.0, seed=i) for i, row in enumerate(prompts.tolist())]
        ended = sorted(sampler.generate(requests), key=lambda completion: completion.request.seed)
        return torch.stack([completion.tokens for completion in ended])

    return generate


def seconds(run: Callable[[], object], device: str) -> float:
    """On a GPU by the clock; on a CPU those of this process's threads, which other processes disturb less."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    started = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def compare(name: str, sequences: int, new: int, device: str, dtype: torch.dtype) -> dict[str, object]:
    """A row: tokens per second of both, the ratio, and the share of equal tokens."""
    shape = MODELS[name]
    model = ours(shape, device, torch.float32 if dtype == torch.int8 else dtype)
    prompts = torch.randint(shape.vocab, (sequences, 16), generator=torch.Generator().manual_seed(1)).to(device)
    trials = {}
    for implementation in IMPLEMENTATIONS:
        try:
            run = theirs(model, implementation)
            run(prompts, 2)
            trials[implementation] = (seconds(lambda run=run: run(prompts, 4), device), run)  # type: ignore[misc]
        except (UnknownExperts, torch.OutOfMemoryError) as error:  # batched_mm copies the experts of every token
            print(f"transformers, {implementation}: {str(error).splitlines()[0]}")
    fastest = min(trials, key=lambda implementation: trials[implementation][0])
    peer = f"transformers, {fastest}"
    runs = {"dryvine": sampler_of(in_8_bits(model) if dtype == torch.int8 else model), peer: trials[fastest][1]}
    tokens = {label: run(prompts, new).cpu() for label, run in runs.items()}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for label, run in runs.items():
            best[label] = min(best[label], seconds(lambda run=run: run(prompts, new), device))  # type: ignore[misc]
    rates = {label: sequences * new / taken for label, taken in best.items()}
    return {
        "model": name,
        "parameters": count_parameters(shape)[0],
        "sequences": sequences,
        "new": new,
        "tokens_per_second": {label: round(rate, 1) for label, rate in rates.items()},
        "ratio": round(rates["dryvine"] / rates[peer], 2),
        "trials_of_peer": {label: round(taken, 3) for label, (taken, _) in trials.items()},
        "same_tokens": float((tokens["dryvine"] == tokens[peer]).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [compare(name, args.sequences, args.new, args.device, getattr(torch, args.dtype)) for name in args.models]
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    result = {"machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
