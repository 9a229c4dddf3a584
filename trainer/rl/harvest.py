"""Correct answers written as conversations to fine-tune on: rejection sampling if the same model learns from them,
distillation if a smaller one does (DeepSeek-R1 distils in this way, without matching logits).

With `rl.harvest` set, a run writes this file instead of updating. Duplicates are dropped and at most so many answers of
a question are kept, the shortest first, since models fine-tuned on their own answers tend to grow longer by repetition.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dryvine.trainer.data.atomic import write_atomically
from dryvine.trainer.rl.groups import Group
from dryvine.trainer.rl.learner import Learner
from dryvine.trainer.rl.questions import SamplingOptions


def harvest(learner: Learner, path: Path, on_answer: Callable[[int, int], None]) -> tuple[int, int]:
    """Sample as many questions as a run would, and write the correct answers. Returns (answers kept, answers sampled).
    Collective."""
    rl, steps = learner.task.rl, learner.rig.config.run.steps
    ask = SamplingOptions(rl.samples, rl.temperature)
    lines: list[str] = []
    asked = 0
    for first in range(0, steps * rl.questions, rl.questions):
        groups = learner.worker.answers(range(first, first + rl.questions), ask, on_answer)
        asked += sum(len(group.answers) for group in groups)
        lines += _lines(groups, rl.chat.answers, rl.harvest_per_question)
    if learner.rig.mesh.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(line + "\n" for line in lines))
    learner.rig.mesh.barrier("writing answers")
    return len(lines), asked


def _lines(groups: Sequence[Group], role: str, most: int) -> Iterator[str]:
    for group in groups:
        ended = [answer for answer in group.answers if answer.completion.reason == "stop" and answer.text]
        right = {answer.text for answer in ended if answer.correct}
        for text in sorted(right, key=lambda text: (len(text), text))[:most]:
            yield json.dumps({"messages": [*group.question.messages, {"role": role, "content": text}]})
