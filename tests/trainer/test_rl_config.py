"""What a user gets wrong in `[rl]`: refused in one line that names the key, before any device is held."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dryvine.trainer.config import Config, ConfigError, load
from dryvine.trainer.data.build import build
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.spec import BuildSpec
from dryvine.trainer.ramps import OptimConfig
from dryvine.trainer.rl.questions import open_task
from dryvine.trainer.rl.tasks.countdown_demos import write
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.sources import open_sources

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "countdown_r1zero.toml"
Load = Callable[..., Config]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folder = tmp_path_factory.mktemp("demo")
    write(folder, 10, 0.6, 0, largest=3)
    (folder / "q.jsonl").write_text('{"prompt": "1 2 3 6", "numbers": [1, 2, 3], "target": 6}\n')
    own = (f'rl.chat.tokenizer="{folder}/tokenizer.json"', "rl.task.largest=3")

    def made(*words: str) -> Config:
        return load(CONFIG, (*own, *(word.replace("FOLDER", str(folder)) for word in words)))

    return made


def refusal(demo: Load, words: tuple[str, ...]) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        open_task(demo(*words))
    message = str(caught.value)
    assert "\n" not in message
    return message


# overrides, and what the line must say
BAD_KEYS = {
    "rl.temperature=nan": "rl.temperature",
    "rl.temperature=1e-300": "rl.temperature: input should be greater than or equal to 0.01",
    "rl.temperature=1e300": "rl.temperature: input should be less than or equal to 100",
    "rl.questions=true": "rl.questions",
    "rl.questions=0": "rl.questions",
    "rl.questions=1000000000000": "answers of one rollout are more than 1,048,576",
    "rl.samples=1": "samples = 1 leaves nothing to compare",
    "rl.samples=1 rl.loss.baseline=batch_std": "samples = 1 leaves nothing to compare",
    "rl.minibatches=-2": "rl.minibatches",
    "rl.minibatches=100000": "answers of one rollout",
    "rl.epochs=1000000000": "rl.epochs",
    "rl.max_tokens=1e30": "rl.max_tokens",
    "rl.max_tokens=100000": "raise data.seq_len",
    "rl.preset=ppo": "rl.preset",
    "rl.loss.kl=nan": "rl.loss.kl",
    "rl.loss.kl=-1": "rl.loss.kl",
    "rl.loss.kll=0": "did you mean kl?",
    "rl.loss.clip=cispo rl.loss.dual_clip=3": "dual_clip bounds the ratio of clip = 'ppo'",
    "rl.loss.correction=mask": 'it needs old = "trainer"',
    "rl.loss.correction=mask rl.old=trainer rl.loss.correction_low=3": "is not below correction_high",
    "rl.loss.kl_estimator=k3_unbiased rl.loss.kl_place=reward": "set kl_place = 'loss'",
    "rl.overlong=penalty rl.overlong_buffer=4096": "is more than max_tokens",
    "rl.alarms.entropy_below=5": "is not less than entropy_above",
    "rl.alarms.reward_drop=2": "rl.alarms.reward_drop",
    "rl.eval_samples=100000000": "rl.eval_samples",
    "rl.harvest=a.jsonl rl.evaluate_only=true": "are two runs",
    'rl.harvest=""': "rl.harvest",
    'rl.harvest="FOLDER"': "name a file in a folder of yours",
    'rl.harvest="FOLDER/q.jsonl/right.jsonl"': "name a file in a folder of yours",
    "rl.task.name=sudoku": "there are countdown, jsonl, reasoning_gym",
    "rl.task.largest=nan": "rl.task.largest",
    "rl.task.largest=1000": "rl.task.largest",
    "rl.task.format_weight=nan": "rl.task.format_weight",
    "rl.task.format_weight=-1": "rl.task.format_weight",
    "rl.task.largst=3": "rl.task.largst: unknown key; did you mean largest?",
    "rl.task.name=jsonl": "rl.task.largest: unknown key; this table has train, ",
    'rl.task={name="jsonl"}': "rl.task.train: must be given (and 2 more); rl.task.name is jsonl",
    "rl.task.puzzles=1": "rl.task.puzzles: unknown key; this table has largest, format_weight",
    'rl.chat.tokenizer="FOLDER/none.json"': "none.json",
    'rl.chat.controls=["<nope>"]': "no special token",
    "rl.chat.answers=bot": "is no role",
    'rl.chat.roles={user="{content}",assistant="{content}"}': "no answer would ever end",
    "rl.foo=1": "rl.foo: unknown key",
    "optim.plan_unit=tokens": "optim.plan_unit, optim.plan: of no use in [rl]",
    "run.spike_factor=2.0": "run.spike_factor",
    "run.timeline_step=1": "run.timeline_step",
    "optim.mtp_weight_plan=[{after=100,to=0.1}]": "optim.mtp_weight_plan",
    "optim.bias_gamma_plan=[{after=100,to=0.0}]": "optim.bias_gamma_plan",
    "batch.ramp_from=2 batch.ramp_increment=2 batch.ramp_tokens=100": "batch.ramp_from",
}


@pytest.mark.parametrize("words", BAD_KEYS)
def test_a_key_that_cannot_be_used_is_refused(demo: Load, words: str) -> None:
    assert BAD_KEYS[words] in refusal(demo, tuple(words.split()))


FILE = 'train="FOLDER/q.jsonl",validation="FOLDER/q.jsonl"'
BAD_FILES = {
    f"{FILE},verifiers={{math=nan}}": "finite number",
    f"{FILE},verifiers={{maths=1.0}}": "no verifier 'maths'",
    f"{FILE},verifiers={{}}": "rl.task.verifiers",
    f"{FILE},verifiers={{countdown=0.0,format=0.0}}": "all weights are 0",
    f'{FILE},verifiers={{countdown=1.0}},prompt="question"': "line 1: no object with a field 'question'",
    'train="FOLDER",validation="FOLDER/q.jsonl",verifiers={countdown=1.0}': "Is a directory",
    'train="FOLDER/none",validation="FOLDER/q.jsonl",verifiers={countdown=1.0}': "No such file",
}


@pytest.mark.parametrize("table", BAD_FILES)
def test_questions_of_ones_own_that_cannot_be_used_are_refused(demo: Load, table: str) -> None:
    assert BAD_FILES[table] in refusal(demo, (f'rl.task={{name="jsonl",{table}}}',))


def test_what_is_right_is_taken(demo: Load) -> None:
    task = open_task(demo(f'rl.task={{name="jsonl",{FILE},verifiers={{countdown=1.0,format=-0.1}}}}'))
    assert task.verifiers == {"countdown", "format"}


ON_A_RECIPE = """extends = "{base}"
{without}
[run]
name = "r1"
steps = 100
[data]
mask = "document"
[batch]
sequences = 8192
[rl]
preset = "r1_zero"
max_tokens = 2048
[rl.chat]
tokenizer = "data/deepseek_v3/tokenizer.json"
roles = {{ user = "<|User|>{{content}}<|Assistant|>", assistant = "{{content}}<|endoftext|>" }}
"""


def test_what_a_pretraining_recipe_brings_is_taken_back_as_the_refusal_says(tmp_path: Path) -> None:
    """All keys that [rl] cannot use are in one line, which can be copied."""
    base, path = CONFIG.with_name("deepseek_v3_671b.toml"), tmp_path / "rl.toml"
    path.write_text(ON_A_RECIPE.format(base=base, without=""))
    with pytest.raises(ConfigError) as caught:
        load(path)
    (line,) = re.findall(r"without = \[.*?\]", str(caught.value))
    path.write_text(ON_A_RECIPE.format(base=base, without=line))
    config = load(path)
    assert max(make_plan(config).training) == 8192
    assert (config.batch.ramp_from, config.optim.plan, config.optim.mtp_weight_plan) == (None, OptimConfig().plan, ())
    assert config.optim.moments == load(base).optim.moments == "bf16"


def test_the_sums_that_make_rl_pretrains_on_fill_both_splits(tmp_path: Path) -> None:
    """With the fraction that the Makefile holds out; five percent of them are shorter than one sequence."""
    (line,) = (line for line in (CONFIG.parents[1] / "Makefile").read_text().splitlines() if "sums.jsonl" in line)
    share = float(line.split("--val-fraction ")[1].split()[0])
    write(tmp_path, 10, 0.6, 0, largest=5)
    spec = BuildSpec(tokenizer=tmp_path / "tokenizer.json", validation_fraction=share)
    build(match_files([f"{tmp_path}/sums.jsonl"]), spec, tmp_path / "sums")
    data = open_sources(load(CONFIG.with_name("countdown_pretrain.toml"), (f'data.source="{tmp_path}/sums"',)))
    assert data.train.sequences(0, 2).shape == data.val.sequences(0, 2).shape == (2, 257)
