"""Answers made one rollout ahead: while the ranks learn from one, a thread of each samples and judges the next.

It samples by the weights of before the update, of which it has a copy, in the training layout and through process
groups of its own. So a step takes as long as the longer of the two, not both, and every answer but the first rollout's
is one rollout stale: ratios are to the probabilities that answers were sampled with, which is the correction, or with
`old = "trainer"` those of a trainer pass, corrected by `loss.correction`. Ranks of their own for sampling, as other
trainers have them, overlap as well, but stand still for whichever side is quicker, and need weights sent.

The price on each rank: the weights once more in the run's dtype, and four bytes a parameter over all ranks for the
masters of before, from which a resumed run makes the answers that were not learnt from yet again, to the token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from dryvine.comm.topology import Topology
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.rig import Rig, make_model, mesh_beside
from dryvine.trainer.rl.asker import Answers, Asker, OnAnswer
from dryvine.trainer.rl.judge import Judge
from dryvine.trainer.rl.questions import Curriculum
from dryvine.trainer.rl.reference import Reference

FIELD = "ahead"  # of a checkpoint's pieces


class Ahead:
    """`behind` are the weights that the next answers of `take` are made by. All methods are collective."""

    def __init__(self, rig: Rig, task: Curriculum, judge: Judge, topology: Topology | None = None) -> None:
        self._rig, self.behind = rig, Reference(rig)
        mesh = mesh_beside(rig.plan, rig.mesh)
        self._copy = make_model(rig.plan, mesh, topology)
        sampler = Sampler.in_layout(self._copy.model, mesh, rig.plan)
        self.asker = Asker(task, sampler, judge.over(mesh), settle=lambda: None)
        self._under_way: _Task | None = None

    def take(self, first: int, on_answer: OnAnswer) -> Answers:
        """Those to question `first` and on, which `begin` has begun; in the first rollout of a process, made now."""
        if self._under_way is None:
            with self.behind.in_place():
                self.begin(first, on_answer)
        assert self._under_way
        answers, self._under_way = self._under_way.result(), None
        return answers

    def begin(self, first: int, on_answer: OnAnswer) -> None:
        """Sample what `take` is to return next, by a copy of the weights that are now published."""
        self._rig.optimizer.zero.settle()
        with torch.no_grad():
            own = {**dict(self._copy.model.named_parameters()), **self._copy.model.buffers}
            for name, live in (*self._rig.model.named_parameters(), *self._rig.model.buffers.items()):
                own[name].copy_(live)
        if self._copy.fp8 is not None:
            self._copy.fp8.cache.expire()
        self._under_way = _Task(lambda: self.asker.rollout(first, on_answer), self._rig.mesh.device)

    def wait(self) -> None:
        """Until nothing is under way."""
        if self._under_way:
            self._under_way.wait()


class _Task:
    """Work in a thread, which a process that ends does not wait for; on a GPU, on a stream of its own."""

    def __init__(self, work: Callable[[], Answers], device: torch.device) -> None:
        self._work, self._device = work, device
        self._found: Answers | BaseException | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._thread = threading.Thread(target=self._run, name="answers ahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()

    def result(self) -> Answers:
        """Raises what the work raised."""
        self.wait()
        assert self._found is not None
        if isinstance(self._found, BaseException):
            raise self._found
        return self._found

    def _run(self) -> None:
        try:
            with self._on_stream():
                self._found = self._work()
        except BaseException as error:  # for the thread that waits
            self._found = error

    def _on_stream(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        torch.cuda.set_device(self._device)
        return torch.cuda.stream(self._stream)
