"""Demonstrations of countdown-3 for fine-tuning, and the tokenizer of its 25 tokens: one token a digit, sign or tag.

`wrong` is the teacher's fault: so many of its demonstrations reach another target than the one asked for, without a
mistake on the way. A student that imitates it learns what an answer looks like and how to calculate, and that the
target matters little; only a verifier can teach it the rest. So what reinforcement adds is not mixed with what more
imitation would have given.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models

from dryvine.trainer.data.tokenizer import END
from dryvine.trainer.rl.tasks.countdown import OPERATIONS, Numbers, applied, every_solution, puzzles, shown
from dryvine.trainer.rl.tasks.question import SplitOfTask
from dryvine.trainer.rl.verifiers.tags import TAGS

CONTROLS = (END, "<unk>", "<|User|>", "<|Assistant|>", *TAGS)
CHARACTERS = "0123456789" + OPERATIONS + "=, "


def tokenizer() -> Tokenizer:
    """25 tokens. Other characters are <unk>."""
    vocabulary = {token: number for number, token in enumerate((*CONTROLS, *CHARACTERS))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROLS])
    return made


def demonstration(numbers: Numbers, target: int, wrong: float, dice: random.Random) -> dict[str, object]:
    """A conversation: a turn with the puzzle, and one with its solution or, with probability `wrong`, the solution of
    another target."""
    solutions = every_solution()[numbers]
    others = [other for other in solutions if other != target]
    reached = dice.choice(others) if others and dice.random() < wrong else target
    order = dice.sample(numbers, len(numbers))
    turns = (("user", shown(order, target)), ("assistant", worked(dice.choice(solutions[reached]))))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def worked(expression: str) -> str:
    """The answer for an expression, with its two steps as thoughts: 7*5=35,35-9=26."""
    signs = [at for at, character in enumerate(expression) if character in OPERATIONS]
    first, second, third = (int(part) for part in (_between(expression, signs)))
    sign, next_sign = (expression[at] for at in signs)
    half = applied(first, sign, second)
    assert half is not None
    steps = f"{first}{sign}{second}={half},{half}{next_sign}{third}={applied(half, next_sign, third)}"
    return f"<think>{steps}</think><answer>{expression}</answer>"


def _between(text: str, cuts: list[int]) -> Iterator[str]:
    for start, end in zip([-1, *cuts], [*cuts, len(text)], strict=True):
        yield text[start + 1 : end]


def write(folder: Path, count: int, wrong: float, seed: int) -> None:
    """`tokenizer.json`, `train.jsonl` of `count` demonstrations, and `validation.jsonl` of a twentieth as many, which
    are right and of held-out puzzles."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    _write(folder / "train.jsonl", "train", count, wrong, random.Random(seed))
    _write(folder / "validation.jsonl", "validation", max(1, count // 20), 0.0, random.Random(seed + 1))


def _write(path: Path, split: SplitOfTask, count: int, wrong: float, dice: random.Random) -> None:
    of_split = list(puzzles(split))
    with path.open("w") as file:
        for _ in range(count):
            numbers, target = dice.choice(of_split)
            print(json.dumps(demonstration(numbers, target, wrong, dice)), file=file)
