"""Questions of reasoning-gym: a hundred generators of puzzles with verifiers (`pip install dryvine[rl]`).

    [rl.task]
    name = "reasoning_gym"
    dataset = "chain_sum"
    options = { max_terms = 3 }

They are made here, from seeds and nothing else; answers are scored in a sandbox (`verifiers/gym.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, Field

from dryvine.comm.extras import lacking
from dryvine.trainer.rl.tasks.question import Question, SplitOfTask, TaskError, user

MOST = 1_000_000  # questions, which are all made at the start


class GymOptions(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The keys of `[rl.task]` beside `name`."""

    dataset: str = Field(description="a name of reasoning_gym.factory.DATASETS")
    options: dict[str, object] = Field(default={}, description="of the dataset's config")
    seed: int = 0
    train_size: int = Field(default=2000, ge=1, le=MOST)
    validation_size: int = Field(default=200, ge=1, le=MOST)
    system: str = Field(default="", description="a first message of the role system")
    partial: bool = Field(default=False, description="keep scores below 1; many datasets give some to any text")
    format_weight: float = Field(default=0.0, ge=0, description="of the format's score in the reward; 0: only measured")


OPTIONS = GymOptions


def questions(options: GymOptions, split: SplitOfTask) -> Sequence[Question]:
    """The questions of a split. Training questions that are also held out, as small datasets produce, are dropped."""
    held_out = _made(options, options.seed + 1, options.validation_size)
    if split == "validation":
        return held_out
    known = {question.messages[-1]["content"] for question in held_out}
    found = [q for q in _made(options, options.seed, options.train_size) if q.messages[-1]["content"] not in known]
    if not found:
        raise TaskError(f"rl.task: {options.dataset} has no question beside the held-out ones; lower validation_size")
    return found


def _made(options: GymOptions, seed: int, size: int) -> list[Question]:
    try:
        import reasoning_gym

        dataset = reasoning_gym.create_dataset(options.dataset, seed=seed, size=size, **options.options)
        texts = [str(dataset[index]["question"]) for index in range(size)]
    except ImportError as error:
        raise TaskError(f"rl.task: {lacking(error)}") from None
    except (ValueError, TypeError, AssertionError) as error:  # no such dataset, no such option, or no such value
        raise TaskError(f"rl.task: {options.dataset}: {error}; reasoning_gym.factory.DATASETS names all") from None
    system = ({"role": "system", "content": options.system},) if options.system else ()
    source = {"dataset": options.dataset, "options": options.options, "seed": seed, "size": size}
    weights = {"reasoning_gym": 1.0, "format": options.format_weight}
    return [
        Question((*system, *user(text)), {**source, "index": index, "partial": options.partial}, weights)
        for index, text in enumerate(texts)
    ]
