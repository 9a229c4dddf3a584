"""The loop of `dryvine rl`: resume, roll out, update, evaluate, check alarms, save, exit cleanly.

As in pretraining, a signal only sets a flag, and all ranks agree on it at the end of a rollout. A checkpoint holds
everything the next rollout depends on. If a kill interrupts a rollout, it is repeated from the previous checkpoint and
gives the same tokens, since those depend only on the weights and on the question's number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console

from dryvine.comm.mesh import Mesh
from dryvine.comm.topology import Topology
from dryvine.trainer.begin import resume
from dryvine.trainer.data.splits import Data
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.journal import Journal
from dryvine.trainer.nonfinite import Diverged
from dryvine.trainer.ramps import Point, learning_rate
from dryvine.trainer.rig import make_rig
from dryvine.trainer.rl.ahead import Ahead
from dryvine.trainer.rl.figures import rollout_figures, sample_lines
from dryvine.trainer.rl.grader import Grader
from dryvine.trainer.rl.harvest import harvest
from dryvine.trainer.rl.learner import Learner
from dryvine.trainer.rl.pictures import draw
from dryvine.trainer.rl.prompt_source import PromptSource
from dryvine.trainer.rl.rollout_worker import RolloutWorker
from dryvine.trainer.run_bar import run_bar
from dryvine.trainer.run_plan import RunPlan
from dryvine.trainer.saves import Saves, crosses
from dryvine.trainer.startup import get_ready
from dryvine.trainer.stop import Stop

Figures = Mapping[str, float | None]
FIGURES = "{task.fields[figures]}"  # of the bars


def reinforce(
    plan: RunPlan,
    mesh: Mesh,
    data: Data,
    topology: Topology | None = None,
) -> bool:
    """Train for `run.steps` updates, from the newest checkpoint of the run folder if there is one. Returns False if a
    signal stopped it early, after a save. Raises Diverged and CheckpointError. Collective."""
    config, run, source = plan.config, plan.config.run, data.train
    assert isinstance(source, PromptSource)
    rig = make_rig(plan, mesh, data, topology)
    console = Console(quiet=mesh.rank != 0)
    with Grader(source.task.rl, source.task.chat, mesh, source.task.verifiers) as grader:
        rl = source.task.rl
        only_answer = rl.evaluate_only or rl.harvest is not None
        worker = RolloutWorker(source.task, Sampler.of_rig(rig), grader, rig.optimizer.zero.settle)
        ahead = Ahead(rig, source.task, grader, topology) if rl.ahead and not only_answer else None
        learner = Learner(rig, worker, ahead)
        if only_answer:
            return _only_answer(learner, console)
        done = resume(rig, console, learner.state())
        if done == 0:
            learner.begin()
        get_ready(rig, topology, console, done)
        saves = Saves(rig, learner.state, console)
        journal = Journal(config, plan.schedule, done, draw) if mesh.rank == 0 else None
        try:
            reached = _Run(learner, saves, journal, console).go(done)
        finally:
            if journal:
                journal.close()
    if reached < run.steps:
        console.print(f"stopped by a signal after update {reached}; the same command goes on from there")
    return reached >= run.steps


def _only_answer(learner: Learner, console: Console) -> bool:
    """Evaluate or harvest with the weights that a run would start from, without updates."""
    resume(learner.rig, console)
    path = learner.task.rl.harvest
    with run_bar(console, FIGURES) as bar:
        task = bar.add_task("answers", total=None, figures="")

        def on_answer(ended: int, of: int) -> None:
            bar.update(task, completed=ended, total=of)

        if path is None:
            lines = [f"{name} {value:.4f}" for name, value in learner.worker.evaluate(on_answer).figures().items()]
        else:
            kept, of = harvest(learner, Path(path), on_answer)
            advice = "; fine-tune on it with sft.train" if kept else ": nothing to fine-tune on"
            lines = [f"{path}: {kept} right answers of {of}{advice}"]
    for line in lines:
        console.print(line, markup=False, highlight=False)
    return True


class _Run:
    """The state of a run in progress."""

    def __init__(self, learner: Learner, saves: Saves, journal: Journal | None, console: Console) -> None:
        self.learner, self.saves, self.journal, self.console = learner, saves, journal, console
        self.mesh, self.run, self.rl = learner.rig.mesh, learner.rig.config.run, learner.task.rl
        self.nonfinite = 0  # updates in a row that changed nothing

    def go(self, done: int) -> int:
        """Run from after `done` updates to the last one, or until a signal. Returns how many updates are done."""
        with Stop().on_signals() as stop, run_bar(self.console, FIGURES) as bar:
            self.bar = bar
            self.whole = bar.add_task(self.run.name, total=self.run.steps, completed=done, figures="")
            self.part = bar.add_task("answers", total=None, figures="")
            if done == 0:
                self._write({"step": 0, **self._evaluate()})
            stopped = False
            while done < self.run.steps and not stopped:
                before, done = done, done + self.rl.updates
                figures = self._rollout(before, done)
                stopped = self._agree(stop.asked)
                self.learner.rig.integrity.check(done, saves=stopped)
                self._save(before, done, figures, stopped)
            self.saves.close()
        self.learner.rig.optimizer.zero.settle()  # nothing is under way when ranks part
        return done

    def _rollout(self, before: int, done: int) -> Figures:
        """One rollout, and its row of metrics.jsonl."""
        outcome = self.learner.rollout(before, self._on_answer)
        point = Point(done - 1, 0, self.rl.questions * self.rl.samples, self.learner.rig.config.data.seq_len)
        figures = {"step": done, "lr": learning_rate(self.learner.rig.config.optim, point), **rollout_figures(outcome)}
        if crosses(before, done, self.run.eval_every) or done >= self.run.steps:
            figures |= self._evaluate()
        self._write(figures)
        alarms = self.learner.alarms.check(figures)
        if self.journal:
            for line in sample_lines(outcome, done):
                self.journal.append("samples.jsonl", line)
            for alarm in alarms:
                self.journal.append("alarms.jsonl", {"step": done, "alarm": alarm})
        for alarm in alarms:
            self.console.print(f"alarm, update {done}: {alarm}", markup=False)
        for learnt in outcome.updates:
            self.nonfinite = 0 if learnt.finite else self.nonfinite + 1
        shown = f"reward {figures['reward']:.3f}" if figures["reward"] is not None else "nothing scored"
        self.bar.update(self.whole, completed=done, figures=shown)
        return figures

    def _evaluate(self) -> dict[str, float]:
        return self.learner.worker.evaluate(self._on_answer).figures()

    def _on_answer(self, ended: int, of: int) -> None:
        self.bar.update(self.part, completed=ended, total=of)

    def _write(self, figures: Figures) -> None:
        if self.journal:
            self.journal.write_figures(int(figures["step"] or 0), figures)

    def _agree(self, asked: bool) -> bool:
        """Whether any rank received a stop signal. Collective."""
        return bool(self.mesh.max(torch.tensor(float(asked), device=self.mesh.device), "whether to stop"))

    def _save(self, before: int, done: int, figures: Figures, stopped: bool) -> None:
        """Save if it is time, and end the run if its figures require it."""
        last = stopped or done >= self.run.steps or self.learner.alarms.stops
        self.saves.after(before, done, last, writing=True)  # whether all ranks have written, nobody has asked
        if self.nonfinite >= self.learner.rig.config.optim.skips:
            self.saves.close()
            raise Diverged(f"update {done}: {self.nonfinite} gradients in a row are not finite; lower optim.lr")
        if self.learner.alarms.stops:
            self.saves.close()
            raise Diverged(
                f"update {done}: alarms in {self.rl.alarms.patience} rollouts in a row, see alarms.jsonl; "
                'lower optim.lr, or set rl.alarms.action = "warn"'
            )
