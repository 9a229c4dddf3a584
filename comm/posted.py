"""Operations of torch.distributed that are posted now and waited for later, each with a deadline and a name.

On a CPU the host waits, and on a GPU a stream; there the watch's thread enforces the deadline, since no host waits.
Posting itself can block (NCCL connects two ranks at their first message) or fail, so the watch is told before an
operation is posted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.distributed as dist

from dryvine.comm.roll_call import Due
from dryvine.comm.watch import Watch


class Posted:
    """The operation that `post` posts is in progress from now on. Without `watch`, torch's own deadlines apply. A
    wait for a gloo collective can be split into short ones, so that the host notices a verdict soon; a wait for a
    gloo message that times out breaks the connection, so that one must be `whole`."""

    def __init__(
        self,
        watch: Watch | None,
        what: str,
        due: Due,
        post: Callable[[], Iterable[dist.Work | None]],
        on_device: bool,
    ) -> None:
        self._watch, self._on_device = watch, on_device
        self._posted = post  # keeps the tensors alive: their memory must not be reused before the wait
        if watch is None:
            self._works = _works(post())
            return
        self._awaited = watch.expect(what, due, lambda: False)
        with watch.breaking(self._awaited):
            self._works = _works(post())
        self._awaited.waited = False
        if not on_device:
            self._awaited.done = self.ready

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        return all(work.is_completed() for work in self._works)

    def wait(self, whole: bool = True) -> None:
        """On a CPU, until it is done; on a GPU the current stream waits."""
        if self._watch is None:
            _wait(self._works)
            return
        self._awaited.wait_from_now()
        with self._watch.breaking(self._awaited):
            if whole or self._on_device:
                _wait(self._works)
            else:
                for work in self._works:
                    self._watch.wait(self._awaited, work)
        if self._on_device:
            self._watch.queued(self._awaited)
        else:
            self._watch.over(self._awaited)


def _works(posted: Iterable[dist.Work | None]) -> list[dist.Work]:
    return [work for work in posted if work is not None]


def _wait(works: Iterable[dist.Work]) -> None:
    for work in works:
        work.wait()
