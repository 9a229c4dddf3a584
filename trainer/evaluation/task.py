"""What a kind of task makes of its lines: a function that asks a model. Made before the model is opened, so that a bad
line is refused while nothing has been read."""

from __future__ import annotations

from collections.abc import Callable

from dryvine.trainer.data.spec import OnProgress
from dryvine.trainer.evaluation.subject import Findings, Subject

Task = Callable[[Subject, OnProgress], Findings]
