"""What replaying a sampler's experts does for the trainer: a BF16 sampler against an FP32 trainer, on a trained model.

    python -m benchmarks.rl_replay configs/countdown_r1zero.toml --answers 512

Answers are sampled with the weights that the config begins with, rounded to BF16, and scored by the FP32 trainer with
its own experts and with those of the sampler (R3). k3 is the mean over tokens of the estimate of the KL divergence.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dryvine.comm.integers import ceil_div
from dryvine.trainer.begin import resume
from dryvine.trainer.config import load
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.shape import blocks
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.rig import Rig, make_rig, mesh_of
from dryvine.trainer.rl.losses import k3
from dryvine.trainer.rl.passes import PassOptions, score
from dryvine.trainer.rl.questions import SamplingOptions, open_task
from dryvine.trainer.rl.rows import Sample
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.sources import open_sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--answers", type=int, default=512)
    words = parser.parse_args()
    config = load(words.config, [*words.overrides, 'run.name="replay"'])
    plan = make_plan(config)
    rig = make_rig(plan, mesh_of(plan, torch.device("cpu")), open_sources(config))
    resume(rig, Console())
    answers = _sampled(rig, words.answers)
    own, replayed = (_apart(rig, answers, replay) for replay in (False, True))
    moved = _moved(rig, answers)
    table = Table("experts of the trainer", "k3", "largest |log-probability| apart")
    for name, apart in (("its own", own), ("the sampler's, replayed", replayed)):
        table.add_row(name, f"{float(k3(apart).mean()):.2e}", f"{float(apart.abs().max()):.3f}")
    console = Console()
    console.print(f"{len(answers)} answers, {len(own)} tokens; {moved:.2%} of choices of a token and layer differ")
    console.print(table)
    console.print(f"k3 is {float(k3(own).mean() / k3(replayed).mean()):.1f} times lower with replay")


def _sampled(rig: Rig, count: int) -> list[Sample]:
    task, shape = open_task(rig.config), rig.config.model
    rounded = Model(
        Spec(shape, torch.bfloat16, "cpu"), {0: tuple(block.name for block in blocks(shape))}, rig.dispatcher
    )
    rounded.load({name: weight.detach() for name, weight in rig.model.named_parameters()} | dict(rig.model.buffers))
    ask = SamplingOptions(task.rl.samples, task.rl.temperature)
    numbers = range(ceil_div(count, ask.samples))
    requests = [request for n in numbers for request in task.requests(task.question(n), n, ask)]
    return [
        Sample(done.request.prompt, done.tokens, done.logprobs, done.routes)
        for done in Sampler.alone(rounded).generate(requests)
    ]


def _apart(rig: Rig, answers: list[Sample], replay: bool) -> Tensor:
    """Log-probabilities of the sampler less those of the trainer, over all tokens."""
    scored = score(rig, answers, PassOptions(1.0, replay=replay))
    return torch.cat([one.sampled - one.old for one in scored if one.old is not None])


def _moved(rig: Rig, answers: list[Sample]) -> float:
    """The share of choices, by token and layer, that the trainer would make otherwise."""
    live = score(rig, answers, PassOptions(1.0, replay=False, record=True))
    pairs = [
        (a.routes.sort(-1).values, b.routes.sort(-1).values)
        for a, b in zip(answers, live, strict=True)
        if a.routes is not None and b.routes is not None
    ]
    return float(torch.cat([(one != other).any(-1).flatten() for one, other in pairs]).double().mean())


if __name__ == "__main__":
    main()
