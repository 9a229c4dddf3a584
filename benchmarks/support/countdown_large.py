"""The countdown recipe with hidden 512 and 8 layers, 100 million parameters, after a short fine-tuning: a start for
benchmarks of reinforcement learning on a GPU, made in a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dryvine.trainer.config import Config, load
from dryvine.trainer.rl.tasks.countdown_demos import write

CONFIGS = Path(__file__).parents[2] / "configs"
DEMONSTRATIONS, WRONG, LARGEST = 20_000, 0.6, 5
LARGE = (
    "model.layers=8", "model.hidden=512", "model.ffn=1536", "model.expert_ffn=256", "model.heads=8",
    "model.q_lora=256", "model.kv_lora=128", "model.nope_dim=64", "model.rope_dim=32", "model.v_dim=64",
    "model.routed=32", "model.top_k=4", "model.groups=4", "model.group_limit=2", "run.dtype=bf16",
    "run.hardware=h100", "batch.sequences=128", "parallel.microbatch_sequences=128",
)  # fmt: skip


def prepare(folder: Path, steps: int, overrides: list[str]) -> Config:
    """Write demonstrations into the folder and fine-tune on them for so many steps. Returns the config of a run with
    1024 answers an update that starts from there."""
    write(folder, DEMONSTRATIONS, WRONG, 0, LARGEST)
    every = [f'run.out="{folder}"', *LARGE, *overrides]
    _fine_tune(folder, steps, every)
    tokenizer = f'rl.chat.tokenizer="{folder}/tokenizer.json"'
    start = f'run.init_from="{folder}/countdown_sft"'
    sizes = ("rl.questions=64", "rl.samples=16", "optim.lr=1e-5")
    return load(CONFIGS / "countdown_r1zero.toml", [*sizes, *every, tokenizer, start])


def _fine_tune(folder: Path, steps: int, overrides: list[str]) -> None:
    files = [f'sft.{name}="{folder}/{name}.jsonl"' for name in ("train", "validation")]
    rate = ("optim.lr=1e-3", 'optim.plan=[{shape="linear",length=50,to=1.0}]')
    ends = (f"run.steps={steps}", f"run.eval_every={steps}", f"run.checkpoint_every={steps}")
    own = [word for word in overrides if not word.startswith("rl.")]
    words = [*files, f'sft.chat.tokenizer="{folder}/tokenizer.json"', *rate, *ends, *own]
    command = [sys.executable, "-m", "dryvine.trainer", str(CONFIGS / "countdown_sft.toml"), *words]
    subprocess.run(command, check=True)
