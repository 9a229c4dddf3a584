"""A task: a function that queries a model, made from the lines of a file. It is made before the model is opened, so a
bad line is refused before any weight is read."""

from __future__ import annotations

from collections.abc import Callable

from dryvine.trainer.data.spec import OnProgress
from dryvine.trainer.evaluation.subject import Findings, Subject

Task = Callable[[Subject, OnProgress], Findings]
