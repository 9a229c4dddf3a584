"""Operations of torch.distributed that are posted now and waited for later, with their deadline and their names.

On a CPU the host waits, and on a GPU a stream; there the watch's thread keeps the deadline, since no host waits.
Posting can block too (NCCL connects two ranks at their first message) or fail, so the watch knows of an operation
before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.distributed as dist

from dryvine.comm.roll_call import Due
from dryvine.comm.watch import Watch


class Posted:
    """What `post` posts is under way from now on. Without `watch` torch's own deadlines apply.

    gloo's wait for a collective can be cut into parts, so that the host hears of a verdict soon; a wait for a message
    that is cut short breaks the connection, so there `whole` waits are for.
    """

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
