"""Random answers to random questions, which need no tokenizer, and rigs that learn from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dryvine.trainer.config import Config
from dryvine.trainer.data.splits import Data
from dryvine.trainer.rig import Rig, make_rig, mesh_of
from dryvine.trainer.rl.rows import Sample
from dryvine.trainer.run_plan import make_plan

RL = (
    'rl.chat.tokenizer="none"',
    'data.mask="document"',
    "rl.max_tokens=16",
    "model.balance_alpha=0.0",
    "batch.sequences=16",
)
LENGTH, MAX_TOKENS = 64, 60
# Tokens of a prompt, and of each answer to it: one that fills a row to its last target, one of a single token beside
# it, prompts of a single token, and a prompt that leaves one token of the row free.
QUESTIONS = ((5, (1, 60, 1, 1)), (1, (1, 7)), (64, (1, 1)), (9, (1, 2, 30, 56, 3)), (1, (64,)))
ODD = (
    *RL, f"data.seq_len={LENGTH}", f"model.max_position={LENGTH}", f"rl.max_tokens={MAX_TOKENS}", "model.layers=3",
    "batch.sequences=4",
)  # fmt: skip


def bare(config: Config, device: str = "cpu") -> Rig:
    """A rig without questions: answers come from here."""
    plan = make_plan(config)
    return make_rig(plan, mesh_of(plan, torch.device(device)), Data(None, None))  # type: ignore[arg-type]


def answers_of(config: Config, count: int = 24, seed: int = 0, routes: bool = True) -> list[Sample]:
    """Random ones to random questions, with random experts."""
    draw = torch.Generator().manual_seed(seed)
    shape = config.model
    integer = lambda low, high: int(torch.randint(low, high, (1,), generator=draw))  # noqa: E731
    normal = lambda n: torch.randn(n, generator=draw)  # noqa: E731

    def experts(tokens: int) -> Tensor:
        """Two of one group, as the gate's limit allows."""
        group = torch.randint(shape.groups, (shape.layers - shape.first_dense, tokens), generator=draw)
        return torch.stack((2 * group, 2 * group + 1), -1).to(torch.int16)

    out = []
    for number in range(count):
        if number % 3 == 0:  # three answers to a question: the experts of all its prompt but the last token too
            p = integer(1, 8)
            prompt, before = torch.randint(shape.vocab, (p,), generator=draw), experts(p - 1)
        n = integer(1, 12)
        tokens = torch.cat((prompt, torch.randint(shape.vocab, (n,), generator=draw)))
        chosen = torch.cat((before, experts(n)), 1)
        logprobs = -5 - normal(n).abs()
        out.append(
            Sample(
                tuple(tokens[:p].tolist()), tokens[p:], logprobs, chosen if routes else None,
                float(normal(1)), logprobs + normal(n) * 0.05, logprobs + normal(n) * 0.1,
            )
        )  # fmt: skip
    return out


def odd_answers(config: Config, questions: Sequence[tuple[int, Sequence[int]]] = QUESTIONS) -> list[Sample]:
    """Random ones with these lengths. Every fifth has no advantage."""
    draw, shape, out = torch.Generator().manual_seed(3), config.model, list[Sample]()
    normal = lambda n, scale: torch.randn(n, generator=draw) * scale  # noqa: E731

    def experts(tokens: int) -> Tensor:
        group = torch.randint(shape.groups, (shape.layers - shape.first_dense, tokens), generator=draw)
        return torch.stack((2 * group, 2 * group + 1), -1).to(torch.int16)

    for asked, lengths in questions:
        prompt, before = torch.randint(shape.vocab, (asked,), generator=draw), experts(asked - 1)
        for n in lengths:
            tokens, base = torch.randint(shape.vocab, (n,), generator=draw), -5.5 - normal(n, 0.3).abs()
            out.append(
                Sample(
                    tuple(prompt.tolist()), tokens, base + normal(n, 0.3), torch.cat((before, experts(n)), 1),
                    float(normal(1, 1.0)) if len(out) % 5 else 0.0, base + normal(n, 0.3), base + normal(n, 0.3),
                )
            )  # fmt: skip
    return out
