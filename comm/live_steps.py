"""Steps that no CUDA graph can contain: waits for other ranks and copies to them, whose numbers differ each time.

They run at once, or, while ops are recorded, between the graphs of each replay. A message whose flags had one constant
value could be recorded too, but then nothing on the host would know at a replay what is awaited, so a rank that is lost
would be a hang without a name.

Each step cuts a graph in two, and a short graph costs a launch and the device a pause. So what need not happen at its
place waits for the next cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class LiveStep:
    run: Callable[[], None]
    waits: bool = False  # for other ranks: other work may be given to the device before it


class LiveSteps:
    """The live steps of one rank's messages. What records ops takes those of the dispatcher."""

    def __init__(self) -> None:
        self.during = ""  # what is being replayed, for errors
        # Of the next message of what is recorded. Ranks need not record the same ops at the same time, and agree on
        # where a message goes by this number alone.
        self.number = 0
        self._cut: Callable[[LiveStep], None] | None = None
        self._held: list[LiveStep] = []

    @property
    def recording(self) -> bool:
        return self._cut is not None

    def run(self, step: LiveStep) -> None:
        """Now, or at this place of each replay."""
        if self._cut is None:
            step.run()
        else:
            self._flush(self._cut)
            self._cut(step)

    def soon(self, step: LiveStep) -> None:
        """Now, or, in each replay, before the next step that is given to `run`, or at the end."""
        if self._cut is None:
            step.run()
        else:
            self._held.append(step)

    def _flush(self, cut: Callable[[LiveStep], None]) -> None:
        for step in self._held:
            cut(step)
        self._held.clear()

    @contextmanager
    def recorded_by(self, cut: Callable[[LiveStep], None]) -> Iterator[None]:
        """`cut` is given each step, in order: what is launched before and after it is in different graphs."""
        self._cut = cut
        try:
            yield
            self._flush(cut)
        finally:
            self._held.clear()
            self._cut = None
