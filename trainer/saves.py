"""When a training loop saves its state: to checkpoints in storage and, with `run.buddy_every`, to the memory of nodes.

Both are written asynchronously, each at its own interval: a copy in memory takes seconds and no storage, so there may
be many of them to a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from dryvine.trainer.checkpoint.memory_saver import MemorySaver
from dryvine.trainer.checkpoint.save import Keep, Saver
from dryvine.trainer.checkpoint.state import RunState
from dryvine.trainer.rig import Rig


class Saves:
    """The saves of one attempt. Collective; raises what `Saver.finish` and `MemorySaver.finish` do."""

    def __init__(self, rig: Rig, state: Callable[[], RunState], console: Console) -> None:
        """`state` returns everything that a checkpoint holds."""
        self._run, self._state, self._console = rig.config.run, state, console
        self._saved = False  # whether the last step is in a checkpoint
        run, identity = self._run, rig.data.identity
        self._disk = Saver(run.folder, Keep(run.keep_checkpoints, run.keep_every), rig.mesh, identity)
        self._disk.prepare(state())
        self._memory = MemorySaver(run, rig.mesh, rig.node, rig.links, identity) if run.buddy_every else None
        if self._memory:
            self._memory.prepare(state())
            if rig.links is None:
                console.print("run.buddy_every: one node, so if it is lost, so are its copies in memory")

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._disk.busy or (self._memory is not None and self._memory.busy)

    def after(self, before: int, done: int, last: bool, writing: bool) -> bool:
        """Call after the steps from `before` + 1 to `done` (several if the loop makes several updates at once). Begins
        the saves that are due, or finishes those in progress if no rank is still `writing`. `last`: the run ends here.
        Returns whether there was anything to do."""
        due = last or crosses(before, done, self._run.checkpoint_every)
        copy = not last and self._run.buddy_every is not None and crosses(before, done, self._run.buddy_every)
        if self._memory and copy:
            self._say(self._memory.begin(done, self._state()))
        if due:
            self._disk.begin(done, self._state())
        self._saved = last
        if due or copy:
            return True
        if writing or not self._pending:
            return False
        self._finish()
        return True

    def close(self) -> None:
        """Finish, and wait until older checkpoints are deleted."""
        self._disk.close()
        if self._memory:
            self._say(self._memory.close(forget=self._saved))

    @property
    def _pending(self) -> bool:
        return self._disk.pending or (self._memory is not None and self._memory.pending)

    def _finish(self) -> None:
        self._disk.finish()
        if self._memory:
            self._say(self._memory.finish())

    def _say(self, trouble: str) -> None:
        if trouble:
            self._console.print(trouble, markup=False)


def crosses(before: int, done: int, every: int) -> bool:
    """Whether a multiple of `every` is among the steps after `before`, up to `done`."""
    return done // every > before // every
