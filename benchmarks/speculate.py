"""Tokens per second with and without MTP's guesses, and the share of guesses that are right, in one run.

    python -m benchmarks.speculate RUN --text FILE --sequences 1 16

RUN's model answers to pieces of a text; without RUN it is the random 0.95M model of `benchmarks.generate` with an MTP
module, the worst case: nothing it guesses is right but by chance. The two take turns, and the best of several rounds is
compared, so that whatever else the machine does falls on both. Asserts that tokens are the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.generate import TINY, ours, seconds
from dryvine.trainer.generate.dialogue import document
from dryvine.trainer.generate.open import load, open_weights
from dryvine.trainer.generate.requests import Completion, Request
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.model.decoder import Model

ROUNDS = 3
PROMPT = 16  # tokens
Prompts = list[tuple[int, ...]]


def random_model() -> tuple[Model, Prompts]:
    model = ours(TINY.model_copy(update={"mtp_depth": 1}), "cpu", torch.float32)
    rows = torch.randint(TINY.vocab, (64, PROMPT), generator=torch.Generator().manual_seed(1))
    return model, [tuple(row) for row in rows.tolist()]


def trained(run: str, text: Path) -> tuple[Model, Prompts]:
    """A run's model, and pieces of a text."""
    source = open_weights(run, mtp=True)
    tokens = document(source.tokenizer(None).vocabulary, text.read_text())
    pieces = [tokens[at : at + PROMPT] for at in range(0, len(tokens) - PROMPT, 3 * PROMPT)]
    return load(source, torch.float32, torch.device("cpu"), lambda *_: None), pieces


def compare(model: Model, prompts: Prompts, new: int, temperature: float) -> dict[str, float]:
    """A row. Raises AssertionError if tokens differ."""
    requests = [Request(prompt, new, temperature, seed=i) for i, prompt in enumerate(prompts)]
    samplers = [Sampler.alone(model, speculate=guess) for guess in (False, True)]
    ended: list[list[Completion]] = [sorted(s.generate(requests), key=lambda c: c.request.seed) for s in samplers]
    plain, guessed = ([c.tokens.tolist() for c in each] for each in ended)
    assert plain == guessed
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS):
        for i, sampler in enumerate(samplers):
            best[i] = min(best[i], seconds(lambda sampler=sampler: list(sampler.generate(requests)), "cpu"))  # type: ignore[misc]
    tokens = sum(map(len, plain))
    return {
        "sequences": len(requests),
        "temperature": temperature,
        "accepted": round(sum(c.accepted for c in ended[1]) / sum(c.drafted for c in ended[1]), 3),
        "tokens_per_second": round(tokens / best[0], 1),
        "speculating": round(tokens / best[1], 1),
        "ratio": round(best[0] / best[1], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--text", type=Path, help="with RUN: a file to go on from")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args()
    if args.run and not args.text:
        parser.error("RUN needs --text")
    model, prompts = trained(args.run, args.text) if args.run else random_model()
    for sequences in args.sequences:
        for temperature in args.temperatures:
            print(json.dumps(compare(model, prompts[:sequences], args.new, temperature)), flush=True)


if __name__ == "__main__":
    main()
