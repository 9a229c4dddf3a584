"""The loop of GRPO beside TRL's GRPOTrainer: same model, weights, questions, verifier, machine and threads, one run.

    python -m benchmarks.rl_peer configs/countdown_r1zero.toml --steps 20 --out rl_peer.json
    python -m benchmarks.rl_peer --large 150 --steps 8 run.device=cuda

Weights are those that the config begins with. The two take turns, an update each, so that whatever else the machine
does falls on both; CPU seconds are told beside those of the clock for the same reason. TRL samples with transformers'
`generate` and its KV cache, and pads each batch to its longest answer. `--experts` is how transformers multiplies with
experts. Tokens are those of answers, of the whole loop: sampled, graded and learnt from. `--large` takes the model of
rl_gpu instead of a config's, in BF16; TRL's weights are then BF16 alone, which is its fastest, and ours have FP32
masters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.support.as_transformers import as_transformers
from benchmarks.support.countdown_large import prepare
from dryvine.trainer.begin import resume
from dryvine.trainer.config import Config, load
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.rehearse import rehearse
from dryvine.trainer.rig import Rig, make_rig, mesh_of
from dryvine.trainer.rl.grader import Grader
from dryvine.trainer.rl.learner import Learner
from dryvine.trainer.rl.questions import RLTask, open_task
from dryvine.trainer.rl.rollout_worker import RolloutWorker
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.sources import open_sources

WARM = 2  # updates that are not counted: what is lazy, and caches
SHOWN = 5  # updates at either end whose rewards are told


@dataclass
class Meter:
    """Of one side, an update each."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    sampling: list[float] = field(default_factory=list)  # of the seconds
    _began: tuple[float, float] = (0.0, 0.0)

    def begin(self) -> None:
        settled()
        self._began = (time.perf_counter(), time.process_time())

    def end(self, tokens: float, reward: float) -> None:
        settled()
        self.seconds.append(time.perf_counter() - self._began[0])
        self.cpu.append(time.process_time() - self._began[1])
        self.tokens.append(tokens)
        self.rewards.append(reward)

    def rate(self, clock: list[float]) -> float:
        """Tokens per second, of the median update."""
        return statistics.median(t / s for t, s in zip(self.tokens[WARM:], clock[WARM:], strict=True))


def settled() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="a config and table.key=value ...; with --large these alone")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--large", type=int, metavar="STEPS", help="rl_gpu's model, fine-tuned for so many steps")
    parser.add_argument("--experts", default="grouped_mm", choices=("eager", "grouped_mm", "batched_mm"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_intermixed_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder:
        config = _config(given.words, given.large, Path(folder))
        found = _side_by_side(config, given.steps, Path(folder), given.experts)
    _show(found)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


def _config(words: list[str], large: int | None, folder: Path) -> Config:
    if large is not None:
        return prepare(folder, large, [*words, "rl.loss.kl=0.0"])
    config, *overrides = words
    return load(Path(config), [*overrides, f'run.out="{folder}"', "rl.loss.kl=0.0"])


def _side_by_side(config: Config, steps: int, folder: Path, experts: str) -> dict[str, Any]:
    task = open_task(config)
    plan = make_plan(config)
    device = torch.device("cuda", 0) if config.run.device == "cuda" else torch.device("cpu")
    rig = make_rig(plan, mesh_of(plan, device), open_sources(config))
    resume(rig, Console(quiet=True))
    if device.type == "cuda":
        rehearse(rig)
    own, other = Meter(), Meter()
    with Grader(task.rl, task.chat, rig.mesh, task.verifiers) as grader:
        trainer = _theirs(rig, task, steps, folder, experts)
        learner = Learner(rig, RolloutWorker(task, Sampler.of_rig(rig), grader, rig.optimizer.zero.settle))

        def our_step(step: int) -> None:
            own.begin()
            outcome = learner.rollout(step, lambda *_: None)
            answers = [answer for group in outcome.answers.groups for answer in group.answers]
            tokens = sum(len(answer.completion.tokens) for answer in answers)
            own.end(tokens, statistics.fmean(answer.reward or 0.0 for answer in answers))
            own.sampling.append(outcome.parts["sample"])

        trainer.add_callback(_turns(other, trainer, our_step))
        trainer.train()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {
        "machine": f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "answers": task.rl.questions * task.rl.samples,
        "ours": _figures(own),
        "trl": _figures(other),
        "ratio_clock": own.rate(own.seconds) / other.rate(other.seconds),
        "ratio_cpu": own.rate(own.cpu) / other.rate(other.cpu),
    }


def _figures(meter: Meter) -> dict[str, Any]:
    mean = statistics.fmean
    return {
        "tokens_per_second": meter.rate(meter.seconds),
        "tokens_per_cpu_second": meter.rate(meter.cpu),
        "sampling_seconds": statistics.median(meter.sampling[WARM:]),
        "other_seconds": statistics.median(
            all_ - one for all_, one in zip(meter.seconds[WARM:], meter.sampling[WARM:], strict=True)
        ),
        "reward_first": mean(meter.rewards[:SHOWN]),
        "reward_last": mean(meter.rewards[-SHOWN:]),
        "rewards": meter.rewards,
        "seconds": meter.seconds,
        "cpu_seconds": meter.cpu,
    }


def _turns(meter: Meter, trainer: Any, our_step: Callable[[int], None]) -> Any:
    """A callback of TRL's trainer that measures its step, and makes one of ours behind it."""
    from transformers import TrainerCallback

    generate = trainer._generate

    def timed(prompts: Any) -> Any:
        settled()
        began = time.perf_counter()
        found = generate(prompts)
        settled()
        meter.sampling.append(time.perf_counter() - began)
        return found

    trainer._generate = timed

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            meter.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            metrics = trainer._metrics["train"]
            tokens = metrics["completions/mean_length"][-1] * args.per_device_train_batch_size
            meter.end(tokens, metrics["reward"][-1])
            our_step(state.global_step - 1)

    return Turns()


def _theirs(rig: Rig, task: RLTask, steps: int, folder: Path, experts: str) -> Any:
    """GRPOTrainer with our weights, in the settings of the config."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    rl, optim = task.rl, rig.config.optim
    model = as_transformers(rig.model, experts)
    on_gpu = rig.mesh.device.type == "cuda"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=rl.chat.tokenizer, padding_side="left")
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(task.chat.stop)
    # Prompts as ours are, to the token; and every question as often as ours asks it.
    asked = [task.question(number) for number in range(steps * rl.questions)]
    rows = [
        {"prompt": tokenizer.decode(task.chat.prompt(question.messages)), "record": json.dumps(question.record)}
        for question in asked
    ]
    settings = GRPOConfig(
        output_dir=str(folder), use_cpu=not on_gpu, max_steps=steps,
        per_device_train_batch_size=rl.questions * rl.samples,
        num_generations=rl.samples, max_completion_length=rl.max_tokens, temperature=rl.temperature, top_k=0,
        learning_rate=optim.lr, lr_scheduler_type="constant", adam_beta1=optim.betas[0], adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps, weight_decay=optim.weight_decay, max_grad_norm=optim.clip, beta=0.0,
        epsilon=rl.loss.clip_low, epsilon_high=rl.loss.clip_high, loss_type="dapo", router_aux_loss_coef=0.0,
        gradient_checkpointing=False, shuffle_dataset=False, report_to="none", save_strategy="no", bf16=on_gpu,
        logging_strategy="no", disable_tqdm=True, seed=rig.config.run.seed,
    )  # fmt: skip
    name = next(iter(asked[0].weights))
    return GRPOTrainer(
        model, reward_funcs=[_reward(name, tokenizer)], args=settings, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip


def _reward(name: str, tokenizer: Any) -> Callable[..., list[float]]:
    """Our verifier in TRL's process: no time of a pool is charged to it. TRL's own text of an answer has lost the tags
    of thought and answer, which are special tokens."""
    from importlib import import_module

    from dryvine.trainer.rl.verifiers.names import VERIFIERS

    verify = import_module(VERIFIERS[name]).verify

    def reward(completion_ids: list[list[int]], record: list[str], **_: Any) -> list[float]:
        texts = (tokenizer.decode([t for t in ids if t != tokenizer.eos_token_id]) for ids in completion_ids)
        return [verify(text, json.loads(one)).score for text, one in zip(texts, record, strict=True)]

    return reward


def _show(found: dict[str, Any]) -> None:
    table = Table(
        "",
        "tokens/s",
        "tokens per CPU second",
        "seconds of sampling",
        "of the rest",
        f"reward, first {SHOWN} updates",
        f"last {SHOWN}",
    )
    for name in ("ours", "trl"):
        one = found[name]
        keys = ("tokens_per_second", "tokens_per_cpu_second")
        shares = ("sampling_seconds", "other_seconds", "reward_first", "reward_last")
        table.add_row(name, *(f"{one[key]:,.0f}" for key in keys), *(f"{one[key]:.3f}" for key in shares))
    console = Console()
    console.print(found["machine"], f"{found['answers']} answers an update")
    console.print(table)
    console.print(f"ours / TRL: {found['ratio_clock']:.2f} by the clock, {found['ratio_cpu']:.2f} by CPU seconds")


if __name__ == "__main__":
    main()
