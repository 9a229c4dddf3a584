"""Command lines that no user should type and some will: wrong types, absurd sizes, broken files, and words that a shell
or SLURM would misread. All are made from the config's own keys and the command's own options, so new ones are included.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from pydantic import BaseModel

from dryvine.trainer.config import Config, load
from dryvine.trainer.rl.tasks.countdown_demos import write
from tests.support.launching import TINY


class Case(NamedTuple):
    name: str
    words: tuple[str, ...]


# As TOML values.
TYPES = ('""', "true", "[]", "{}", "nan", "-inf", "1e400", "[[1]]", "1979-05-27", '"\\u0000"')
SIZES = ("0", "-1", "1.5", "9223372036854775807", "1000000000", "3")
NASTY = ("$(touch pwned)", "`touch pwned`", "'; touch pwned; '", '"; touch pwned; "', "a b", "-x", "\n", "é", "../..",
         "a" * 5000, "@{python}", "${run[@]}", "#SBATCH --wrap=x", "%j", "\\", "|touch pwned", "\x1b[31m")  # fmt: skip
OPTIONS = ("partition", "account", "qos", "reservation", "constraint", "exclude", "name", "time", "interface", "ib-hca",
           "container", "mounts")  # fmt: skip
NUMBERS = ("nodes", "gpus-per-node", "array", "cpus-per-rank")
CONFIGS = Path(__file__).parents[2] / "configs"
SLURM = ("launch", "slurm", TINY, "--nodes=1", "--gpus-per-node=1", "--dry-run")


def cases(corpus: Path, folder: Path) -> Iterator[Case]:
    """All of them; each has a folder for its runs in `folder`."""
    for number, case in enumerate(_cases(corpus, folder)):
        yield case._replace(words=tuple(word.replace("NUMBER", str(number)) for word in case.words))


def _cases(corpus: Path, folder: Path) -> Iterator[Case]:
    given = (f'data.source="{corpus}"', f'run.out="{folder / "runs/NUMBER"}"', "run.steps=1")
    for key, value in _values():
        # A billion steps, or batches of a validation, are legal and take years.
        dry = ("--dry-run",) if key in ("run.steps", "run.eval_batches") else ()
        yield Case(f"{key}={value}", ("train", TINY, *dry, *given, f"{key}={value}"))
    reinforced, out = _reinforced(folder), given[1]
    for key, value in _values():
        if key.startswith(("rl.", "run.", "parallel.")):
            dry = ("--dry-run",) if key == "run.steps" else ()
            yield Case(f"rl {key}={value}", ("train", reinforced, *dry, out, "run.steps=1", f"{key}={value}"))
    for number, path in enumerate(_files(folder)):
        yield Case(f"file {number}: {path.name[:40]}", ("train", str(path), *given))
    for word in ("=", "a", "a=", ".=1", "run.=1", "run..name=1", "run.name.x=1", "run.name", "x.y=1", "\n=\n", *NASTY):
        yield Case(f"override {word[:40]!r}", ("train", TINY, *given, word))
    for word in NASTY:
        yield Case(f"run.name {word[:40]!r}", (*SLURM, *given, f"run.name={word}"))
        yield Case(f"data.source {word[:40]!r}", (*SLURM, *given, f"data.source={word}"))
        yield Case(f"run.out {word[:40]!r}", (*SLURM, *given, f"run.out={word}"))
        for key in ("run.name", "run.out", "run.init_from", "data.source"):
            yield Case(f"--dry-run {key} {word[:40]!r}", ("train", TINY, "--dry-run", *given, f"{key}={word}"))
        for key in ("run.name", "run.out", "run.init_from"):
            yield Case(f"--one-gpu {key} {word[:40]!r}", ("train", TINY, "--one-gpu", *given, f"{key}={word}"))
        for option in OPTIONS:
            yield Case(f"--{option} {word[:40]!r}", (*SLURM, *given, f"--{option}={word}"))
    for option in NUMBERS:
        for size in ("0", "-1", "x", "", "1e9", str(10**30), str(2**40)):
            yield Case(f"--{option} {size}", (*SLURM, *given, f"--{option}={size}"))
    for key, value in _values():
        if value in ("0", "9223372036854775807", "1000000000", "nan"):
            yield Case(f"--one-gpu {key}={value}", ("train", TINY, "--one-gpu", *given, f"{key}={value}"))


def _values() -> Iterator[tuple[str, str]]:
    """Each key of the config in turn with each value in turn, so that the number stays the number of keys times two."""
    values = TYPES + SIZES
    tree = load(TINY, ("data.source=x",)).model_dump(mode="json")
    for number, key in enumerate(keys()):
        for turn in range(2):
            yield key, values[(number + turn * (len(values) // 2)) % len(values)]
        if type(_at(tree, key)) is int:
            yield key, "1000000000"


def _keys(model: type[BaseModel], before: str) -> Iterator[str]:
    """Dotted, of tables within tables and of those that a config need not have, too."""
    for name, field in model.model_fields.items():
        yield f"{before}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _keys(kind, f"{before}{name}.")


def keys() -> list[str]:
    """Every key of a config, dotted."""
    return [key for key in _keys(Config, "") if key not in Config.model_fields]


def _at(tree: object, key: str) -> object:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _reinforced(folder: Path) -> str:
    """A config of a small run that learns from answers to countdown."""
    demo = folder / "demo"
    write(demo, 10, 0.6, 0, largest=3)
    path = folder / "reinforced.toml"
    path.write_text(f"""
extends = "{CONFIGS / "countdown.toml"}"
[run]
device = "cpu"
eval_every = 1
[rl]
preset = "dapo"
dynamic = false
overlong = "keep"
minibatches = 1
questions = 2
samples = 2
max_tokens = 8
eval_problems = 2
eval_samples = 1
[rl.task]
name = "countdown"
largest = 3
[rl.chat]
tokenizer = "{demo / "tokenizer.json"}"
controls = ["<think>", "</think>", "<answer>", "</answer>"]
roles = {{ user = "<|User|>{{content}}<|Assistant|>", assistant = "{{content}}<|endoftext|>" }}
""")
    return str(path)


def _files(folder: Path) -> Iterator[Path]:
    """Configs that are none."""
    good = Path(TINY).read_text()
    contents = {
        "empty": b"",
        "binary": bytes(range(256)) * 40,
        "cut": good.encode()[:700],
        "byte-order-mark": b"\xef\xbb\xbf" + good.encode(),
        "deep": b"a = " + b"[" * 20000,
        "wide": b"x = 1\n" * 20000,
        "twice": good.encode() * 2,
        "json": json.dumps({"run": 1}).encode(),
        "extends-number": b"extends = 3\n" + good.encode(),
        "without-number": b"without = 3\n" + good.encode(),
        "without-nothing": b'without = ["run.name"]\n' + good.encode(),
        "extends-self": b'extends = "extends-self.toml"\n' + good.encode(),
        "extends-folder": b'extends = "."\n' + good.encode(),
        "extends-nul": b'extends = "\\u0000"\n' + good.encode(),
        "table-is-value": b"run = 3\n",
        "value-is-table": good.replace('name = "tiny"', "name = {}").encode(),
        "array-of-tables": good.replace("[run]", "[[run]]").encode(),
        "key-with-newline": b'"a\\nb" = 1\n' + good.encode(),
        "escape": b'"\\u001b[31m" = 1\n' + good.encode(),
        "$(touch pwned)": good.encode(),
        "a b 'c": good.encode(),
    }
    for name, content in contents.items():
        path = folder / f"{name}.toml"
        path.write_bytes(content)
        yield path
    (folder / "dangling.toml").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.toml")
    yield from (folder / "dangling.toml", folder / "pipe.toml", folder, Path("/dev/zero"), Path("/proc/self/mem"))
    yield from (Path("/" + "a" * 5000), folder / "tiny.tom", Path("x\udcff.toml"))
