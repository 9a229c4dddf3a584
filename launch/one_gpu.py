"""`dryvine train CONFIG --one-gpu`: any config scaled down to one GPU or CPU, for a debugger.

Each thing shrinks by its own rule, in `_model` and below, so that every kind of block, loss, routing, number format and
schedule op that the config has, and one rank can have, is still there, in the smallest number that exercises it.
Guessing a model of about the right size would be simpler and could lose the very branch to be debugged. The result is
an ordinary config file, printed key by key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import tomli_w

from dryvine.comm.config import CommConfig
from dryvine.comm.integers import ceil_div, round_up
from dryvine.launch.files import write_file
from dryvine.launch.plan.plan import budget
from dryvine.parallel.schedule.table import legal
from dryvine.trainer.config import Config, RunConfig, dump, load
from dryvine.trainer.data.config import STDLIB, DataConfig, DataError
from dryvine.trainer.data.dataset import Dataset
from dryvine.trainer.model.shape import Shape, count_parameters
from dryvine.trainer.ramps import BatchConfig, Change, OptimConfig

MICROBATCHES = 4  # the fewest with which a pipeline of one rank in a V fills, pairs and empties
STEPS, PERIOD = 50, 10  # so that what happens every so many steps happens early
PERIODS = ("eval_every", "checkpoint_every", "integrity_every", "buddy_every", "timeline_step")
SEQUENCE = 512  # tokens, at most
VOCABULARY = 4096  # of the embedded corpus, where the config's own data is not on this machine
BYTES = 18  # a parameter: weight, gradient sum, master, two moments, in FP32; temporaries of it
TILE = 128  # FP8 scales cover so many columns, and kernels ask for multiples of it
WIDTHS = ("hidden", "ffn", "expert_ffn", "heads", "q_lora", "kv_lora")


def write_one_gpu(path: Path, overrides: Sequence[str], memory: float) -> tuple[Path, list[str]]:
    """Write the config, scaled down to `memory` bytes, into its run folder. Returns its path, and lines that list
    every change. Raises ConfigError and CannotWrite."""
    whole = load(path, overrides)
    small = shrunk(whole, memory)
    target = small.run.folder / "one_gpu.toml"
    write_file(target, dump(small))
    return target, [f"one GPU, in {target}:", *(f"  {line}" for line in _changes(whole, small))]


def shrunk(config: Config, memory: float) -> Config:
    """The config on one rank, with parameters, gradients and optimizer in about `memory` bytes at most."""
    schedule, chunks = _schedule(config)
    parallel = config.parallel.model_copy(update={"pp": 1, "dp": 1, "ep": 1, "schedule": schedule, "chunks": chunks})
    data = _data(config.data)
    vocab = max(min(config.model.vocab, VOCABULARY), data.vocab_size)
    table = {
        "run": _run(config),
        "model": _model(config.model, vocab, chunks, memory),
        "data": data,
        "batch": _batch(config, data.seq_len),
        "parallel": parallel,
        "comm": _comm(config.comm),
    }
    small = config.model_copy(update=table)
    small = small.model_copy(update={"optim": _optim(config, small)})
    # Through JSON, so that what is written is what was checked.
    return Config.model_validate_json(small.model_dump_json())


def _schedule(config: Config) -> tuple[str, int]:
    """The schedule itself where one rank can run it. A schedule with two directions needs two ranks; folded into a V
    it runs on one rank with two stages, with the same F&B pairs and W."""
    p = config.parallel
    if legal(p.schedule, 1, MICROBATCHES, p.chunks) is None:
        return p.schedule, p.chunks
    return "dualpipev", 1


def _data(data: DataConfig) -> DataConfig:
    """The same data in shorter sequences; the embedded corpus with few token ids, if the data is not on this
    machine."""
    seq_len = min(data.seq_len, SEQUENCE)
    try:
        ids = Dataset.load(Path(data.source)).vocab_size
    except (DataError, OSError):
        return data.model_copy(
            update={"seq_len": seq_len, "source": STDLIB, "blend": (), "vocab_size": min(data.vocab_size, VOCABULARY)}
        )
    return data.model_copy(update={"seq_len": seq_len, "vocab_size": ids})


def _model(shape: Shape, vocab: int, chunks: int, memory: float) -> Shape:
    """One dense layer if there are any, two MoE layers, and one MTP depth; more if the schedule has more stages.
    Each routing group keeps twice as many experts as a token may choose of it, at least four. Widths are halved
    together until the model fits."""
    dense = min(shape.first_dense, 1)
    layers = min(shape.layers, max(dense + 2, chunks + 1))
    in_group = shape.routed // shape.groups
    keep = min(in_group, max(4, ceil_div(2 * shape.top_k, shape.group_limit)))
    small = shape.model_copy(
        update={
            "layers": layers,
            "first_dense": min(dense, layers),
            "routed": shape.groups * keep,
            "vocab": vocab,
            "mtp_depth": min(shape.mtp_depth, 1),
        }
    )
    while BYTES * count_parameters(small, mtp=True)[0] > memory:
        halved = small.model_copy(update={name: _half(name, getattr(small, name)) for name in WIDTHS})
        if halved == small:
            break
        small = halved
    return small


def _half(name: str, width: int | None) -> int | None:
    """Half a width, but at least one head or one tile."""
    if name == "heads":
        return max(1, (width or 0) // 2)
    return width if width is None or width <= TILE else round_up(width // 2, TILE)


def _run(config: Config) -> RunConfig:
    run = config.run
    given = {name: getattr(run, name) for name in PERIODS}
    periods = {name: min(value, PERIOD) for name, value in given.items() if value is not None}
    name = f"{run.name}-one-gpu"
    return run.model_copy(update={"name": name, "steps": min(run.steps, STEPS), "eval_batches": 1, **periods})


def _batch(config: Config, seq_len: int) -> BatchConfig:
    """MICROBATCHES of the config's size. A ramp becomes one from half of that, over four steps."""
    full = MICROBATCHES * config.parallel.microbatch_sequences
    if config.batch.ramp_from is None:
        return BatchConfig(sequences=full)
    tokens = 4 * full * seq_len
    return BatchConfig(sequences=2 * full, ramp_from=full, ramp_increment=full, ramp_tokens=tokens)


def _comm(comm: CommConfig) -> CommConfig:
    """One rank is one node; DeepEP and MPI would have nothing to send."""
    alone = {"deepep": "auto", "mpi": "auto"}
    return comm.model_copy(
        update={
            "dispatcher": alone.get(comm.dispatcher, comm.dispatcher),
            "topology": comm.topology.model_copy(update={"nodes": ()}),
        }
    )


def _optim(whole: Config, small: Config) -> OptimConfig:
    """The learning rate's segments in proportion to the steps, late changes of weights to the tokens."""
    optim, fewer = whole.optim, small.run.steps
    total = sum(segment.length for segment in optim.plan) if optim.plan_unit == "tokens" else whole.run.steps
    parts = [
        segment.model_copy(update={"length": max(1, segment.length * fewer // max(1, total))}) for segment in optim.plan
    ]
    share = _tokens(small) / _tokens(whole)
    late = {name: _earlier(getattr(optim, name), share) for name in ("mtp_weight_plan", "bias_gamma_plan")}
    return optim.model_copy(update={"plan": tuple(parts), "plan_unit": "steps", **late})


def _tokens(config: Config) -> float:
    return sum(tokens for _, tokens in budget(config))


def _earlier(changes: tuple[Change, ...], share: float) -> tuple[Change, ...]:
    """After a share of their tokens; no two at once."""
    found: list[Change] = []
    for change in sorted(changes, key=lambda change: change.after):
        after = max(round(change.after * share), found[-1].after + 1 if found else 1)
        found.append(change.model_copy(update={"after": after}))
    return tuple(found)


def _changes(before: Config, after: Config) -> Iterator[str]:
    """One line per changed key, such as: optim.lr = 0.001, was 0.002"""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    for table, values in new.items():
        for key, value in (values or {}).items():  # a table that is not there is None
            if value != old[table][key]:
                yield f"{table}.{key} = {_short(value)}, was {_short(old[table][key])}"


def _short(value: object) -> str:
    text = tomli_w.dumps({"": value}).partition("=")[2].split() if value is not None else ["none"]
    joined = " ".join(text)
    return joined if len(joined) <= 60 else joined[:57] + "..."
