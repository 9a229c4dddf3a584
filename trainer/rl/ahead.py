"""Sampling one rollout ahead: while the ranks learn from one rollout, a thread of each samples and grades the next.

It samples with a copy of the weights from before the update, in the training layout and through process groups of its
own. A step then takes as long as the longer of the two, and every answer but the first rollout's is one rollout stale:
ratios are taken to the probabilities that answers were sampled with, which corrects for that, or with `old = "trainer"`
to those of a trainer pass, corrected by `loss.correction`. Separate ranks for sampling, as in other trainers, overlap
as well, but idle whenever their side is quicker, and need the weights sent.

The price on each rank: a second copy of the weights in the run's dtype, and four bytes a parameter over all ranks for
the masters from before the update, from which a resumed run samples the unfinished answers again, to the same tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from dryvine.comm.topology import Topology
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.rig import Rig, make_model, mesh_beside
from dryvine.trainer.rl.grader import Grader
from dryvine.trainer.rl.questions import RLTask
from dryvine.trainer.rl.reference import Reference
from dryvine.trainer.rl.rollout_worker import Answers, OnAnswer, RolloutWorker

FIELD = "ahead"  # of a checkpoint's pieces


class Ahead:
    """`behind` are the weights that the next answers of `take` are sampled with. All methods are collective."""

    def __init__(self, rig: Rig, task: RLTask, grader: Grader, topology: Topology | None = None) -> None:
        self._rig, self.behind = rig, Reference(rig)
        mesh = mesh_beside(rig.plan, rig.mesh)
        self._copy = make_model(rig.plan, mesh, topology)
        sampler = Sampler.in_layout(self._copy.model, mesh, rig.plan)
        self.worker = RolloutWorker(task, sampler, grader.over(mesh), settle=lambda: None)
        self._under_way: _Task | None = None

    def take(self, first: int, on_answer: OnAnswer) -> Answers:
        """The answers to questions from `first` on, which `begin` has started; in the first rollout of a process,
        sampled now."""
        if self._under_way is None:
            with self.behind.in_place():
                self.begin(first, on_answer)
        assert self._under_way
        answers, self._under_way = self._under_way.result(), None
        return answers

    def begin(self, first: int, on_answer: OnAnswer) -> None:
        """Start to sample what `take` returns next, with a copy of the current weights."""
        self._rig.optimizer.zero.settle()
        with torch.no_grad():
            own = {**dict(self._copy.model.named_parameters()), **self._copy.model.buffers}
            for name, live in (*self._rig.model.named_parameters(), *self._rig.model.buffers.items()):
                own[name].copy_(live)
        if self._copy.fp8 is not None:
            self._copy.fp8.cache.expire()
        self._under_way = _Task(lambda: self.worker.rollout(first, on_answer), self._rig.mesh.device)

    def wait(self) -> None:
        """Wait until nothing is in progress."""
        if self._under_way:
            self._under_way.wait()


class _Task:
    """Work in a daemon thread, which does not keep a process alive; on a GPU, on a stream of its own."""

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
        """The result of the work. Raises what the work raised."""
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
