"""The loop of GRPO beside TRL's GRPOTrainer: same model, weights, questions, verifier, machine and threads, one run.

    python -m benchmarks.rl_peer configs/countdown_r1zero.toml --steps 20 --out rl_peer.json

Weights are those that the config begins with. The two take turns, an update each, so that whatever else the machine
does falls on both; CPU seconds are told beside those of the clock for the same reason. TRL samples with transformers'
`generate` and its KV cache, pads each batch to its longest answer, and gets the fastest implementation of experts that
transformers has on a CPU. Tokens are those of answers, of the whole loop: sampled, judged and learnt from.
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
from dryvine.trainer.begin import resume
from dryvine.trainer.config import Config, load
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.rig import Rig, make_rig, mesh_of
from dryvine.trainer.rl.asker import Asker
from dryvine.trainer.rl.judge import Judge
from dryvine.trainer.rl.learner import Learner
from dryvine.trainer.rl.questions import Curriculum, open_task
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
    _began: tuple[float, float] = (0.0, 0.0)

    def begin(self) -> None:
        self._began = (time.perf_counter(), time.process_time())

    def end(self, tokens: float, reward: float) -> None:
        self.seconds.append(time.perf_counter() - self._began[0])
        self.cpu.append(time.process_time() - self._began[1])
        self.tokens.append(tokens)
        self.rewards.append(reward)

    def rate(self, clock: list[float]) -> float:
        """Tokens per second, of the median update."""
        return statistics.median(t / s for t, s in zip(self.tokens[WARM:], clock[WARM:], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder:
        config = load(words.config, [*words.overrides, f'run.out="{folder}"', "rl.loss.kl=0.0"])
        found = _side_by_side(config, words.steps, Path(folder))
    _show(found)
    if words.out:
        words.out.write_text(json.dumps(found, indent=1) + "\n")


def _side_by_side(config: Config, steps: int, folder: Path) -> dict[str, Any]:
    task = open_task(config)
    plan = make_plan(config)
    rig = make_rig(plan, mesh_of(plan, torch.device("cpu")), open_sources(config))
    resume(rig, Console(quiet=True))
    own, other = Meter(), Meter()
    with Judge(task.rl, task.chat, rig.mesh, task.verifiers) as judge:
        trainer = _theirs(rig, task, steps, folder)
        learner = Learner(rig, Asker(task, Sampler.of_rig(rig), judge, rig.optimizer.zero.settle))

        def our_step(step: int) -> None:
            own.begin()
            outcome = learner.rollout(step, lambda *_: None)
            answers = [answer for group in outcome.answers.groups for answer in group.answers]
            tokens = sum(len(answer.completion.tokens) for answer in answers)
            own.end(tokens, statistics.fmean(answer.reward or 0.0 for answer in answers))

        trainer.add_callback(_turns(other, trainer, our_step))
        trainer.train()
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
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
        "reward_first": mean(meter.rewards[:SHOWN]),
        "reward_last": mean(meter.rewards[-SHOWN:]),
        "rewards": meter.rewards,
        "seconds": meter.seconds,
        "cpu_seconds": meter.cpu,
    }


def _turns(meter: Meter, trainer: Any, our_step: Callable[[int], None]) -> Any:
    """A callback of TRL's trainer that measures its step, and makes one of ours behind it."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            meter.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            metrics = trainer._metrics["train"]
            tokens = metrics["completions/mean_length"][-1] * args.per_device_train_batch_size
            meter.end(tokens, metrics["reward"][-1])
            our_step(state.global_step - 1)

    return Turns()


def _theirs(rig: Rig, task: Curriculum, steps: int, folder: Path) -> Any:
    """GRPOTrainer with our weights, in the settings of the config."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    rl, optim = task.rl, rig.config.optim
    model = as_transformers(rig.model, "grouped_mm")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=rl.chat.tokenizer, padding_side="left")
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(task.chat.stop)
    # Prompts as ours are, to the token; and every question as often as ours asks it.
    asked = [task.question(number) for number in range(steps * rl.questions)]
    rows = [
        {"prompt": tokenizer.decode(task.chat.prompt(question.messages)), "record": json.dumps(question.record)}
        for question in asked
    ]
    settings = GRPOConfig(
        output_dir=str(folder), use_cpu=True, max_steps=steps, per_device_train_batch_size=rl.questions * rl.samples,
        num_generations=rl.samples, max_completion_length=rl.max_tokens, temperature=rl.temperature, top_k=0,
        learning_rate=optim.lr, lr_scheduler_type="constant", adam_beta1=optim.betas[0], adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps, weight_decay=optim.weight_decay, max_grad_norm=optim.clip, beta=0.0,
        epsilon=rl.loss.clip_low, epsilon_high=rl.loss.clip_high, loss_type="dapo", router_aux_loss_coef=0.0,
        gradient_checkpointing=False, shuffle_dataset=False, report_to="none", save_strategy="no", bf16=False,
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
    table = Table("", "tokens/s", "tokens per CPU second", f"reward, first {SHOWN} updates", f"last {SHOWN}")
    for name in ("ours", "trl"):
        one = found[name]
        keys = ("tokens_per_second", "tokens_per_cpu_second", "reward_first", "reward_last")
        table.add_row(name, *(f"{one[key]:,.3f}" if "reward" in key else f"{one[key]:,.0f}" for key in keys))
    console = Console()
    console.print(found["machine"], f"{found['answers']} answers an update")
    console.print(table)
    console.print(f"ours / TRL: {found['ratio_clock']:.2f} by the clock, {found['ratio_cpu']:.2f} by CPU seconds")


if __name__ == "__main__":
    main()
