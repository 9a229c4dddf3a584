"""The tasks by name: the table `[rl.task]`. One of your own is a file and a line here.

A task is a module with `OPTIONS`, the pydantic model of its keys, and `questions(options, split)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from dryvine.trainer.config import explain
from dryvine.trainer.rl.tasks.question import Question, SplitOfTask, TaskError

TASKS = {
    "countdown": "dryvine.trainer.rl.tasks.countdown",
    "jsonl": "dryvine.trainer.rl.tasks.jsonl",
    "reasoning_gym": "dryvine.trainer.rl.tasks.gym",
}


def questions(task: Mapping[str, object], split: SplitOfTask) -> Sequence[Question]:
    """The questions of a task, always in the same order. `task` is the table: its name and its own keys. Raises
    TaskError."""
    name = task.get("name")
    if name not in TASKS:
        raise TaskError(f"rl.task.name = {name!r}: there are {', '.join(TASKS)}")
    module = importlib.import_module(TASKS[str(name)])
    try:
        options = module.OPTIONS(**{key: value for key, value in task.items() if key != "name"})
    except ValidationError as error:
        raise TaskError(f"rl.task.{explain(error, module.OPTIONS)}; rl.task.name is {name}") from None
    found: Sequence[Question] = module.questions(options, split)
    return found
