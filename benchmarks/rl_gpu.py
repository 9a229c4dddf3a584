"""Rollouts in FP8 beside updates in BF16, on one GPU: how far sampler and trainer are apart, and how fast each is.

    python -m benchmarks.rl_gpu [--warm 200] [--rollouts 5] [--out rl_gpu.json] [table.key=value ...]

The countdown recipe with 110 million parameters. After a warm start, every way answers the same questions in turns and
learns from its answers: FP8 samplers have a copy of the weights, made anew before each rollout. Mismatches are those of
the first update of a rollout, whose weights are the sampler's. MFU counts tokens of answers and, for updates, of
one prompt a question; forward alone for sampling, against the dense BF16 peak of `run.hardware`. On a CPU
(`run.device=cpu`) FP8 is emulated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.support.countdown_large import prepare
from dryvine.comm.dispatch.single_rank import SingleRank
from dryvine.launch.plan.hardware import load_hardware
from dryvine.launch.plan.plan import make
from dryvine.trainer.begin import resume
from dryvine.trainer.config import Config
from dryvine.trainer.fp8.choose import choose_engines
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.fp8.recipe import preset
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.shape import blocks, count_parameters
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.rehearse import rehearse
from dryvine.trainer.rig import Rig, make_rig, mesh_of
from dryvine.trainer.rl.grader import Grader
from dryvine.trainer.rl.learner import Learner, RolloutOutcome
from dryvine.trainer.rl.questions import RLTask, open_task
from dryvine.trainer.rl.rollout_worker import RolloutWorker
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.sources import open_sources

WARM = 2  # rollouts of each way that are not counted: kernels are compiled and loaded, graphs recorded
Figures = dict[str, float]


@dataclass(frozen=True)
class Way:
    """How answers are sampled, and whether an update replays the sampler's experts."""

    fp8: bool
    replay: bool

    def __str__(self) -> str:
        return f"{'FP8' if self.fp8 else 'BF16'}{', replayed' if self.replay else ''}"


WAYS = [Way(fp8, replay) for fp8 in (True, False) for replay in (True, False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--warm", type=int, default=200, help="steps of fine-tuning before")
    parser.add_argument("--rollouts", type=int, default=5, help="that are counted, of each way")
    parser.add_argument("--out", type=Path)
    given = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as name:
        config = prepare(Path(name), given.warm, given.overrides)
        found = in_turns(config, given.rollouts)
    show(config, found)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


def in_turns(config: Config, rollouts: int) -> dict[str, Figures]:
    """Medians over the counted rollouts of each way."""
    task, plan = open_task(config), make_plan(config)
    device = torch.device("cuda", 0) if config.run.device != "cpu" else torch.device("cpu")
    rig = make_rig(plan, mesh_of(plan, device), open_sources(config))
    resume(rig, Console())
    if device.type == "cuda":
        rehearse(rig)
    rows: dict[str, list[Figures]] = {str(way): [] for way in WAYS}
    with Grader(task.rl, task.chat, rig.mesh, task.verifiers) as grader:
        learners = {str(way): _learner(rig, task, grader, way) for way in WAYS}
        for number in range(WARM + rollouts):
            for name, learner in learners.items():
                rows[name].append(_figures(rig, learner.rollout(number, lambda *_: None)))
                print(number, name, {key: f"{value:.3g}" for key, value in rows[name][-1].items()}, flush=True)
    return {
        name: {key: statistics.median(row[key] for row in some[WARM:]) for key in some[0]}
        for name, some in rows.items()
    }


def _learner(rig: Rig, task: RLTask, grader: Grader, way: Way) -> Learner:
    replayed = task.rl.model_copy(update={"replay": "rollout" if way.replay else "off"})
    sampler, settle = _in_fp8(rig) if way.fp8 else (Sampler.of_rig(rig), rig.optimizer.zero.settle)
    own = replace(task, rl=replayed)
    return Learner(rig, RolloutWorker(own, sampler, grader, settle))


def _in_fp8(rig: Rig) -> tuple[Sampler, Callable[[], None]]:
    """A sampler in FP8, and the function that copies the newest weights into it."""
    shape, recipe = rig.config.model, preset("deepseek_v3")
    fp8 = FP8(recipe, *choose_engines(recipe, rig.mesh, rig.config.run.folder))
    print(fp8.chosen, flush=True)
    spec = Spec(shape, torch.bfloat16, rig.mesh.device, fp8=fp8)
    model = Model(spec, {0: tuple(block.name for block in blocks(shape))}, SingleRank(shape.routed))

    def settle() -> None:
        rig.optimizer.zero.settle()
        model.load({name: weight.detach() for name, weight in rig.model.named_parameters()} | rig.model.buffers)
        fp8.cache.expire()

    settle()
    return Sampler.alone(model), settle


def _figures(rig: Rig, outcome: RolloutOutcome) -> Figures:
    answers = [answer for group in outcome.answers.groups for answer in group.answers]
    new = sum(len(answer.completion.tokens) for answer in answers)
    prompts = sum(len(group.answers[0].completion.request.prompt) for group in outcome.answers.groups)  # computed once
    first, seconds = outcome.updates[0], outcome.parts
    machine = load_hardware(rig.config.run.hardware or "cpu")
    share = make(rig.plan, machine).flop_per_token[0] / (machine.peak_bf16 * 1e12)
    return {
        "reward": statistics.fmean(answer.reward or 0.0 for answer in answers),
        "k3": first.sums.mean("k3"),
        "largest": first.largest_apart,
        "routes": first.other_routes,
        "sampled_per_second": new / seconds["sample"],
        "sampling_mfu": share / 3 * new / seconds["sample"],
        "learnt_per_second": (new + prompts) / seconds["learn"],
        "learning_mfu": share * (new + prompts) / seconds["learn"],
        "whole_per_second": new / outcome.seconds,
    }


def show(config: Config, found: Mapping[str, Figures]) -> None:
    table = Table("sampled in", "k3", "largest", "routes", "sampled/s", "MFU", "learnt/s", "MFU", "answers' tokens/s")
    for name, row in found.items():
        table.add_row(
            name, f"{row['k3']:.2e}", f"{row['largest']:.3f}", f"{row['routes']:.2%}" if "replayed" in name else "",
            f"{row['sampled_per_second']:,.0f}", f"{row['sampling_mfu']:.2%}", f"{row['learnt_per_second']:,.0f}",
            f"{row['learning_mfu']:.2%}", f"{row['whole_per_second']:,.0f}",
        )  # fmt: skip
    parameters = count_parameters(config.model)[0]
    answers = config.rl.questions * config.rl.samples if config.rl else 0
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    console = Console(width=130)
    console.print(f"{gpu}: {parameters / 1e6:.0f}M parameters, {answers} answers an update, tokens/s by medians")
    console.print(table)
    for kind in ("FP8", "BF16"):
        plain, replayed = found[kind]["k3"], found[f"{kind}, replayed"]["k3"]
        console.print(f"{kind}: k3 is {plain / max(replayed, 1e-30):.1f} times lower with replay")


if __name__ == "__main__":
    main()
