"""What a user gets wrong in a config is reported in one line, with the fix, before anything starts."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from dryvine.comm.config import CommConfig
from dryvine.trainer.config import Config, ConfigError, check_world, dump, load
from dryvine.trainer.ramps import OptimConfig
from dryvine.trainer.run_plan import make_plan
from tests.support.hostile_cases import SIZES, TYPES, keys
from tests.support.launching import TINY

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))

# override -> what the one line must hold: the place, and the fix
WRONG = {
    "optim.lrr=1": ("optim.lrr: unknown key", "did you mean lr?"),
    "model.yarn.foo=1": ("model.yarn.foo: unknown key", "factor"),
    "optim.lr=fast": ("optim.lr", "'fast'"),
    "run.steps=0": ("run.steps", "0"),
    'run.dtype="fp16"': ("run.dtype", "'fp32' or 'bf16'"),
    "run.name=a b": ("run.name", "a b"),
    'run.name=".."': ("run.name", ".."),
    'run.name="."': ("run.name", "."),
    'run.name="-rf"': ("run.name", "-rf"),
    "optim.betas=[1.5, 0.9]": ("optim.betas.0", "less than 1, not 1.5"),
    "optim.betas=[0.9, 1.0]": ("optim.betas.1", "less than 1, not 1.0"),
    "optim.betas=[-0.1, 0.9]": ("optim.betas.0", "greater than or equal to 0"),
    "optim.eps=-1": ("optim.eps", "greater than 0, not -1"),
    "optim.eps=nan": ("optim.eps", "finite"),
    "optim.lr=inf": ("optim.lr", "finite"),
    "optim.weight_decay=-0.1": ("optim.weight_decay", "greater than or equal to 0"),
    "comm.deadline=inf": ("comm.deadline", "finite"),
    "model.init_std=inf": ("model.init_std", "finite"),
    "model.rope_theta=0": ("model.rope_theta", "greater than 0"),
    'run.on_damage="ignore"': ("run.on_damage", "'stop' or 'previous'"),
    "parallel.schedule=dualpype": ("dualpype", "dualpipe"),
    "parallel.pp=3": ("dualpipe cannot run pp=3", "even", "pp=2"),
    "batch.sequences=4": ("microbatches=2", "microbatches=4"),
    "batch.sequences=17": ("17 is not a multiple", "16 or 18"),
    "parallel.ep=3": ("4 experts do not divide", "ep may be one of [1, 2, 4]"),
    "model.top_k=3": ("top_k=3", "lower top_k to 2"),
    "model.groups=3": ("routed=4 does not divide into groups=3", "multiple"),
    "data.vocab_size=4096": ("model.vocab = 320", "raise model.vocab"),
    "data.seq_len=33": ("data.seq_len = 33 is more than model.max_position = 32", "set data.seq_len = 32 or less"),
    "model.max_position=31": ("data.seq_len = 32", "model.max_position = 31", "raise model.max_position"),
    "model.yarn={ factor = 1.5, original = 16 }": ("max_position = 32", "factor = 24", "raise model.yarn.factor"),
    "model.recompute=['norm', 'transposes']": ("fp8.linear = 'bf16' has none", "model.recompute = ['norm']"),
    "parallel.pp=10": ("at least 10 blocks", "fewer pipeline ranks"),
    "nonsense": ("'nonsense'", "table.key=value"),
    "comm.topology.nodes=[3, 2]": ("[3, 2] are 5 ranks", "pp x dp x ep are 4"),
    "comm.topology.nodes=[4, 0]": ("comm.topology.nodes.1", "greater than 0"),
    "comm.topology.intra_gigabytes=inf": ("comm.topology.intra_gigabytes", "finite"),
    "comm.dispatcher=flatt": ("comm.dispatcher", "flat"),
    "fp8.preset={}": ("fp8.preset", "'bf16'"),
    "rl.preset=[]": ("rl", "preset"),
    f"run.name={'a' * 256}": ("run.name", "at most 255 bytes"),
    f"run.out={'a/' * 2000}": ("run.out", "at most 3800"),
    'run.init_from="a\\u0000"': ("run.init_from", "can be printed"),
    'data.source="\\u001b[31m"': ("data.source", "can be printed"),
    f"data.source={'é' * 128}": ("data.source", "at most 255 bytes"),
}


@pytest.mark.parametrize("value", TYPES + SIZES)
def test_any_value_of_any_key_makes_a_plan_or_one_line(value: str) -> None:
    said = [refusal("data.source=x", f"{key}={value}") for key in keys()]
    assert all(line.isprintable() for line in said)
    assert any(said)


def refusal(*overrides: str) -> str:
    """What a config with these is refused with; empty if it is not."""
    try:
        make_plan(load(TINY, overrides))
    except ConfigError as refused:
        return str(refused)
    return ""


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_config_is_refused_in_one_line_with_the_fix(tiny: Callable[..., Config], override: str) -> None:
    layout = ["parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe"]
    if override == "parallel.pp=10":
        layout[2] = "parallel.schedule=one_f_one_b"
    with pytest.raises(ConfigError) as caught:
        make_plan(tiny(*layout, override))
    said = str(caught.value)
    assert "\n" not in said
    for part in WRONG[override]:
        assert part in said


def test_sequences_may_be_as_long_as_the_model_allows(tiny: Callable[..., Config]) -> None:
    assert tiny("data.seq_len=64", "model.max_position=64").data.seq_len == 64
    assert tiny("data.seq_len=8").data.seq_len == 8
    assert tiny("model.yarn={ factor = 2.0, original = 16 }").model.yarn


def test_a_sequence_too_long_by_inheritance_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f'extends = "{ROOT / "tests" / "tiny.toml"}"\n[data]\nseq_len = 64\n')
    with pytest.raises(ConfigError, match=r"mine\.toml: data\.seq_len = 64 is more than"):
        load(tmp_path / "mine.toml")


def test_a_world_of_another_size_is_refused(tiny: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"2 x 1 x 1 = 2 ranks, but 3 were launched"):
        check_world(tiny("parallel.pp=2"), 3)


def test_the_command_says_it_in_one_line_and_exits_with_2(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text(f'extends = "{ROOT / "configs" / "tiny_cpu.toml"}"\n')
    for words in ([str(config), "optim.lrr=1"], [str(tmp_path / "mime.toml")]):
        done = subprocess.run(
            [sys.executable, "-m", "dryvine.trainer", *words], capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "did you mean" in done.stderr


def test_extends_and_overrides_come_in_order(tmp_path: Path) -> None:
    text = (ROOT / "tests" / "tiny.toml").read_text()
    (tmp_path / "base.toml").write_text(text)
    (tmp_path / "mine.toml").write_text('extends = "base.toml"\n[optim]\nlr = 0.5\nclip = 2.0\n')
    config = load(tmp_path / "mine.toml", ["optim.clip=3"])
    assert (config.optim.lr, config.optim.clip, config.model.layers) == (0.5, 3.0, 6)
    (tmp_path / "base.toml").write_text('extends = "mine.toml"\n')
    with pytest.raises(ConfigError, match="extends itself"):
        load(tmp_path / "mine.toml")


def test_without_takes_back_keys_and_tables_of_the_extended_file(tmp_path: Path) -> None:
    text = (ROOT / "tests" / "tiny.toml").read_text()
    (tmp_path / "base.toml").write_text(
        text.replace("[optim]", "[optim]\nema = 0.9").replace("[run]", "[run]\nwandb = 'x'")
    )
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "base.toml"\nwithout = ["run.wandb", "comm", "optim"]\n[optim]\nlr = 0.5\n')
    config = load(mine)
    assert (config.run.wandb, config.run.steps, config.comm) == (None, 6, CommConfig())
    assert config.optim == OptimConfig(lr=0.5)


@pytest.mark.parametrize(
    ("without", "says"),
    [
        ('["batch.ramp"]', "without: 'batch.ramp' is nothing that `extends` brings"),
        ('["optim.lr.x"]', "'optim.lr.x' is nothing"),
        ('["fp8.preset"]', "'fp8.preset' is nothing"),
        ('[""]', "'' is nothing"),
        ('"run.wandb"', "without = 'run.wandb': list inherited keys or tables, such as"),
        ("[1]", "without = [1]: list"),
    ],
)
def test_what_without_cannot_take_back_is_said_in_a_line(tmp_path: Path, without: str, says: str) -> None:
    (tmp_path / "mine.toml").write_text(f'extends = "{TINY}"\nwithout = {without}\n')
    with pytest.raises(ConfigError, match=re.escape(says)):
        load(tmp_path / "mine.toml")


def test_what_was_left_to_defaults_is_written_too(tiny: Callable[..., Config]) -> None:
    """A later version may have others, and the run folder must say what the run had."""
    assert tomllib.loads(dump(tiny()))["optim"]["eps"] == 1e-8


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_ours_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load(path)
    (tmp_path / "config.toml").write_text(dump(config))
    assert load(tmp_path / "config.toml") == config
    names = [name for stage in make_plan(config).blocks for name in stage]
    assert names[0] == "embed"
    assert len(set(names)) == len(names)
