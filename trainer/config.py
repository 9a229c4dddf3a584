"""The config of a run: TOML files composed of the tables of their owners, checked before any process group exists.

Defaults < `extends` file, less what `without` takes back of it < file < dotted overrides on the command line. Every
model is frozen and refuses unknown keys.
What is derived from it (`run_plan`) is never written back, so the `config.toml` in a run folder is what the user asked
for and can be run again. In the alternative, one flat namespace of flags as in Megatron, keys have no owner.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import tomli_w
from pydantic import BaseModel, Field, ValidationError

from dryvine.comm.config import CommConfig
from dryvine.parallel.config import ParallelConfig
from dryvine.trainer.data.config import DataConfig
from dryvine.trainer.fp8.recipe import Recipe
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.ramps import BatchConfig, OptimConfig
from dryvine.trainer.rl.config import RLConfig
from dryvine.trainer.rl.presets import PRESETS
from dryvine.trainer.rl.sft_config import SFTConfig

RECORDED = "config.toml"  # of a run folder
WIDEST_HEAD = 256  # of flash attention, which packed documents need
Positive = Annotated[int, Field(ge=1)]
LONGEST = 4 << 20  # bytes of a config
# Bytes that Linux takes of a folder's name, and of a path: 4096, less what lies below a run's folder.
LONGEST_PART, LONGEST_PATH = 255, 3800
Tree = dict[str, object]  # parsed TOML: tables are trees, the rest are values


class ConfigError(ValueError):
    """One readable line: which file and key, what is wrong, and the fix."""


class RunConfig(BaseModel, frozen=True, extra="forbid"):
    """The `[run]` table: length, precision, device, and where results are written."""

    # Excludes paths, options of commands, and `.` and `..`, which would be folders of other runs.
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    steps: Positive
    seed: int = 0
    dtype: Literal["fp32", "bf16"] = "bf16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    wandb: str | None = None  # project of Weights & Biases to which metrics are also logged
    hardware: str | None = None  # the intended machine: a name or file that `dryvine plan` accepts
    out: str = "runs"
    checkpoint_every: Positive = 1000
    keep_checkpoints: Positive = 2  # how many of the newest are kept
    keep_every: Positive | None = None  # steps whose checkpoints are kept for ever: multiples of this
    on_damage: Literal["stop", "previous"] = "stop"  # if the newest checkpoint is damaged: end, or load the one before
    init_from: str | None = None  # initial weights of a new run: a checkpoint, or a run folder for its newest
    init_optimizer: bool = False  # also take its moments, averages and count of updates
    # A loss of this many times the median of the last 20: return to the newest checkpoint, and skip the data since.
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    integrity_every: Positive | None = None  # steps between bitwise comparisons of all copies of the weights
    buddy_every: Positive | None = None  # steps between copies of all state in the memory of this node and the next
    buddy_folder: str = "/dev/shm"  # where each node keeps the copies: a folder in its memory
    eval_every: Positive = 100
    eval_batches: Positive = 1
    timeline_step: Positive | None = None  # draw this step's measured timeline over the simulated one

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name


class Config(BaseModel, frozen=True, extra="forbid"):
    """Everything that decides what a run computes and how."""

    run: RunConfig
    model: Shape
    data: DataConfig
    batch: BatchConfig
    parallel: ParallelConfig = ParallelConfig()
    comm: CommConfig = CommConfig()
    optim: OptimConfig = OptimConfig()
    fp8: Recipe = Recipe()  # off
    sft: SFTConfig | None = None  # if given, the run trains on conversations and not on `data.source`
    rl: RLConfig | None = None  # if given, the run generates its data by sampling


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file with its `extends` chain and apply `table.key=value` overrides. Raises ConfigError."""
    config = _valid(Path(path), overrides)
    if problem := _conflict(config):
        raise ConfigError(f"{path}: {problem}")
    return config


def recorded(folder: Path) -> Config:
    """The config that a run was begun with, from its folder. Tables that contradict each other are taken as they are:
    the code that ran it took them. Raises ConfigError."""
    path = folder / RECORDED
    if not path.exists():
        raise ConfigError(f"{folder}: no run folder: it has no {RECORDED}")
    return _valid(path, ())


def check_world(config: Config, world: int) -> None:
    """Raise ConfigError unless the config's layout has as many ranks as were launched."""
    p = config.parallel
    if p.world != world:
        raise ConfigError(
            f"parallel.pp x dp x ep = {p.pp} x {p.dp} x {p.ep} = {p.world} ranks, but {world} were launched: "
            f"launch {p.world}, or set parallel.pp/dp/ep to match"
        )


def dump(config: Config) -> str:
    """The config as TOML that `load` reads back to the same value."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def flat(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """The values of nested tables by their dotted keys: optim.lr, 0.001."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _valid(path: Path, overrides: Sequence[str]) -> Config:
    """A config whose tables are valid one by one. Raises ConfigError."""
    tree = _read(path, ())
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(_over_preset(tree))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Config)}") from None


def _read(path: Path, seen: tuple[Path, ...]) -> Tree:
    if path in seen:
        raise ConfigError(f"{path}: extends itself through {' -> '.join(map(str, seen))}; remove one `extends`")
    try:
        tree = tomllib.loads(_text(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_near_file(path)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: cannot be read as TOML: nested too deeply") from None
    except (OSError, ValueError) as error:  # not UTF-8, not TOML, no path at all
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None
    base, without = tree.pop("extends", None), tree.pop("without", [])
    if not isinstance(base, str | None):
        raise ConfigError(f"{path}: extends = {base!r}: write the path of a config, from this file's folder")
    inherited = {} if base is None else _read(path.parent / base, (*seen, path))
    if not isinstance(without, list) or not all(isinstance(key, str) for key in without):
        raise ConfigError(f'{path}: without = {without!r}: list inherited keys or tables, such as ["batch.ramp_from"]')
    for key in without:
        if not _take_back(inherited, key):
            raise ConfigError(f"{path}: without: {key!r} is nothing that `extends` brings; remove it")
    return _merge(inherited, tree)


def _take_back(tree: Tree, dotted: str) -> bool:
    """Remove a key or a table. Returns whether it was there."""
    table, dot, rest = dotted.partition(".")
    inner = tree.get(table)
    if dot:
        return isinstance(inner, dict) and _take_back(inner, rest)
    return tree.pop(table, None) is not None


def _text(path: Path) -> str:
    """The text of a regular file; a pipe or a device might never end. Raises OSError."""
    if path.exists() and not path.is_file():
        raise OSError("it is not a file")
    with path.open("rb") as file:
        content = file.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise OSError(f"it is longer than {LONGEST >> 20} MiB")
    return content.decode()


def _merge(base: Tree, over: Mapping[str, object]) -> Tree:
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def _over_preset(tree: Tree) -> Tree:
    """The tree merged over the preset that rl.preset names. Validation refuses unknown names later."""
    table = tree.get("rl")
    name = table.get("preset", "grpo") if isinstance(table, dict) else None
    return _merge(dict(PRESETS[name]), tree) if isinstance(name, str) and name in PRESETS else tree


def _apply(tree: Tree, override: str) -> None:
    dotted, equals, text = override.partition("=")
    *tables, key = dotted.split(".")
    if not equals or not tables or not all((*tables, key)):
        raise ConfigError(f"override {override!r}: write table.key=value, for example optim.lr=1e-3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    for table in tables:
        inner = tree.setdefault(table, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {table} is a value, not a table; drop what follows it")
        tree = inner
    tree[key] = value


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first complaint about a `root` as one line, and how many more there are."""
    # A misspelt key explains the others, such as the one that is then missing.
    first, *more = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    match first["type"]:
        case "extra_forbidden":
            line = f"unknown key{_near_key(first['loc'], root)}"
        case "missing":
            line = "must be given"
        case "value_error":
            line = str(first["ctx"]["error"])
        case _:
            line = f"{first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"
    key = ".".join(str(part) for part in first["loc"])
    return (f"{key}: {line}" if key else line) + (f" (and {len(more)} more)" if more else "")


def _near_key(location: tuple[int | str, ...], root: type[BaseModel]) -> str:
    """What to do about the unknown key at the end of `location`: the nearest key of its table, or all of them."""
    table: type[BaseModel] | None = root
    for part in location[:-1]:
        # An index into a list stays with the model of the list's items.
        if isinstance(part, str) and table is not None:
            table = _model_in(table.model_fields[part].annotation)
    if table is None:
        return "; remove it"
    near = difflib.get_close_matches(str(location[-1]), table.model_fields, n=1)
    return f"; did you mean {near[0]}?" if near else f"; this table has {', '.join(table.model_fields)}"


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The model in `Model`, `Model | None` or `tuple[Model, ...]`."""
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _near_file(path: Path) -> str:
    names = [str(p) for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _conflict(config: Config) -> str | None:
    """The first pair of tables that contradict each other, with the fix, or None. What depends on the schedule is
    found by `run_plan`."""
    m, ep = config.model, config.parallel.ep
    if m.routed % ep:
        divisors = [n for n in range(1, m.routed + 1) if m.routed % n == 0]
        return f"model.routed = {m.routed} experts do not divide over parallel.ep = {ep}; ep may be one of {divisors}"
    if ep == 1 and config.comm.dispatcher == "deepep":
        return "comm.dispatcher = 'deepep': with parallel.ep = 1 no token travels; set 'auto'"
    nodes = config.comm.topology.nodes
    if nodes and sum(nodes) != config.parallel.world:
        return (
            f"comm.topology.nodes = {list(nodes)} are {sum(nodes)} ranks, but parallel.pp x dp x ep are "
            f"{config.parallel.world}; give the ranks of each node, or leave it out"
        )
    if m.vocab < config.data.vocab_size:
        return f"model.vocab = {m.vocab} is less than data.vocab_size = {config.data.vocab_size}; raise model.vocab"
    if (config.sft or config.rl) and config.data.mask != "document":
        return "data.mask = 'none' lets answers see each other; set data.mask = 'document'"
    if config.rl and (why := _not_of_rl(config)):
        return why
    if config.data.mask == "document" and m.qk_dim > WIDEST_HEAD:
        return (
            f"data.mask = 'document' has no kernel for heads of nope_dim + rope_dim = {m.qk_dim} elements; "
            f"lower them to {WIDEST_HEAD} in all, or set data.mask = 'none'"
        )
    if "transposes" in m.recompute and not config.fp8.fp8:
        return (
            f"model.recompute: 'transposes' are of FP8 weights, of which fp8.linear = {config.fp8.linear!r} has none; "
            f"set model.recompute = {[what for what in m.recompute if what != 'transposes']}"
        )
    return _too_long(m, config.data.seq_len) or _no_path(config)


def _not_of_rl(config: Config) -> str | None:
    """Keys that a run with [rl] would ignore though somebody has set them. Other ignored keys have a value in every
    config and are not refused: model.balance_alpha, bias_gamma and mtp_weight, data.source, run.eval_batches."""
    if config.sft:
        return "[sft] and [rl] are two runs: run.init_from begins the second with the weights of the first"
    run, batch, optim = config.run, config.batch, config.optim
    given = {
        ("run.spike_factor",): run.spike_factor,  # the loss has no usual size: [rl.alarms]
        ("run.timeline_step",): run.timeline_step,  # several passes, which are not drawn
        # As many passes as answers fill.
        ("batch.ramp_from", "batch.ramp_tokens"): batch.ramp_from,
        # As many tokens as answers have. Lengths in tokens are no lengths in steps.
        ("optim.plan_unit", "optim.plan"): optim.plan_unit == "tokens",
        ("optim.mtp_weight_plan",): optim.mtp_weight_plan,  # MTP does not learn
        ("optim.bias_gamma_plan",): optim.bias_gamma_plan,  # biases do not move
    }
    if keys := [key for together, value in given.items() if value for key in together]:
        return (
            f"{', '.join(keys)}: of no use in [rl] (docs/rl.md says why); leave out what is given here, and take back "
            f"what is inherited: without = {json.dumps(keys)}, beside `extends`"
        )
    return None


def _too_long(model: Shape, seq_len: int) -> str | None:
    """Why sequences have positions that the model does not."""
    if seq_len > model.max_position:
        return (
            f"data.seq_len = {seq_len} is more than model.max_position = {model.max_position}; "
            f"set data.seq_len = {model.max_position} or less, or raise model.max_position"
        )
    if model.yarn and model.max_position > model.yarn.original * model.yarn.factor:
        reach = int(model.yarn.original * model.yarn.factor)
        return (
            f"model.max_position = {model.max_position} is more than model.yarn.original x factor = {reach}; "
            "lower model.max_position, or raise model.yarn.factor"
        )
    return None


def _no_path(config: Config) -> str | None:
    """Why a key that names a file or folder can name none. Not by asking the file system, which another host may
    have."""
    run, data = config.run, config.data
    keys = {
        "run.name": run.name,
        "run.out": run.out,
        "run.init_from": run.init_from,
        "run.buddy_folder": run.buddy_folder,
    }
    given = [*keys.items(), ("data.dir", str(data.dir)), *(("data.source", source) for source in data.sources)]
    for key, path in given:
        whole = os.fsencode(path or "")
        printable = not path or path.isprintable()
        if not printable or len(whole) > LONGEST_PATH or max(map(len, whole.split(b"/"))) > LONGEST_PART:
            return (
                f"{key} = {_shortened(repr(path))} is no path: a name in it has at most {LONGEST_PART} bytes, all of "
                f"it at most {LONGEST_PATH}, and all characters can be printed"
            )
    return None


def _shortened(text: str) -> str:
    return text if len(text) < 80 else f"{text[:60]}... ({len(text):,} characters)"
