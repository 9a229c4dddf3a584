"""Demonstrations of countdown-3 for fine-tuning, and the tokenizer of its 25 tokens: one token a digit, sign or tag.

`wrong` is the teacher's fault: so many of its demonstrations aim at another target than the one asked for, say so, and
reach that one without a mistake on the way. A student that imitates it learns what an answer looks like, how to plan
and how to calculate, and that the target asked for matters little; only a verifier can teach it the rest. So what
reinforcement adds is not mixed with what more imitation would have given. (A teacher that does not say what it aims at
leaves a student that cannot tell noise from plans: after a thousand steps it was right as often as if it had not been
told the target.)
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models

from dryvine.trainer.data.tokenizer import END
from dryvine.trainer.rl.tasks.countdown import (
    LARGEST_NUMBER,
    OPERATIONS,
    Numbers,
    Solutions,
    applied,
    every_solution,
    puzzles,
    shown,
)
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


def demonstration(
    numbers: Numbers, target: int, solutions: Solutions, wrong: float, dice: random.Random
) -> dict[str, object]:
    """A conversation: a turn with the puzzle, and one with its solution or, with probability `wrong`, the solution of
    another target."""
    others = [other for other in solutions if other != target]
    reached = dice.choice(others) if others and dice.random() < wrong else target
    order = dice.sample(numbers, len(numbers))
    turns = (("user", shown(order, target)), ("assistant", worked(dice.choice(solutions[reached]))))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def worked(expression: str) -> str:
    """The answer for an expression. Its thoughts are the aim and the two steps to it: 26,7*5=35,35-9=26."""
    signs = [at for at, character in enumerate(expression) if character in OPERATIONS]
    first, second, third = (int(part) for part in (_between(expression, signs)))
    sign, next_sign = (expression[at] for at in signs)
    half = applied(first, sign, second)
    assert half is not None
    aim = applied(half, next_sign, third)
    steps = f"{first}{sign}{second}={half},{half}{next_sign}{third}={aim}"
    return f"<think>{aim},{steps}</think><answer>{expression}</answer>"


def _between(text: str, cuts: list[int]) -> Iterator[str]:
    for start, end in zip([-1, *cuts], [*cuts, len(text)], strict=True):
        yield text[start + 1 : end]


def write(folder: Path, count: int, wrong: float, seed: int, largest: int = LARGEST_NUMBER) -> None:
    """`tokenizer.json`, `train.jsonl` of `count` demonstrations with numbers up to `largest`, and `validation.jsonl` of
    a twentieth as many, which are right and of held-out puzzles; and `sums.jsonl`, texts to pretrain on."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    solved, held_out = every_solution(largest), max(1, count // 20)
    right = _demonstrations(list(puzzles("validation", largest)), solved, 0.0, random.Random(seed + 1))
    mixed = _demonstrations(list(puzzles("train", largest)), solved, wrong, random.Random(seed))
    for name, lines, number in (("train", mixed, count), ("validation", right, held_out)):
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in itertools.islice(lines, number))
    with (folder / "sums.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in sums(largest))


def sums(largest: int) -> Iterator[str]:
    """Every step that a solution can have: 45-8=37."""
    for left, sign, right in itertools.product(range(1 - largest, largest**2 + 1), OPERATIONS, range(1, largest + 1)):
        value = applied(left, sign, right)
        if value is not None:
            yield f"{left}{sign}{right}={value}"


def _demonstrations(
    puzzles: Sequence[tuple[Numbers, int]], solved: Mapping[Numbers, Solutions], wrong: float, dice: random.Random
) -> Iterator[dict[str, object]]:
    """Without an end."""
    while True:
        numbers, target = dice.choice(puzzles)
        yield demonstration(numbers, target, solved[numbers], wrong, dice)
