"""Opens mutated files one after the other under a limit on memory, and says of each what became of it.

Arguments: kind (hf or gguf), the run folder, the folder with the export, the number of mutations. A line of JSON each.
"""

from __future__ import annotations

import json
import pickle
import random
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dryvine.trainer.checkpoint.reader import open_checkpoint
from dryvine.trainer.hand_off.commands import ExportAs, check_files
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.export_hf import INDEX
from dryvine.trainer.hand_off.import_hf import import_hf
from dryvine.trainer.hand_off.readers import GGUF
from dryvine.trainer.hand_off.run_files import open_run
from tests.support.hand_off import quiet

GIB = 1 << 30
Mutation = Callable[[bytes, random.Random], bytes]
HUGE = (b"999999999999", b"-1", b"1e400", b"null", b'"x"', b"[]", b"{}", b"18446744073709551615")


def _numbers(data: bytes) -> list[tuple[int, int]]:
    """Where numbers of JSON lie."""
    return [match.span() for match in re.finditer(rb"(?<=[:\[,])\s*\d+", data)]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flip(data: bytes, rng: random.Random, within: int = 4096) -> bytes:
    """One bit of the first bytes: the header."""
    changed = bytearray(data)
    changed[rng.randrange(min(within, len(data)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def number(data: bytes, rng: random.Random) -> bytes:
    """A number of JSON becomes another value; lengths of the file stay where they can."""
    begin, end = rng.choice(_numbers(data[:100_000]))
    return data[:begin] + rng.choice(HUGE) + data[end:]


def length(data: bytes, rng: random.Random) -> bytes:
    """The first eight bytes, a length in safetensors, and a word of the header in GGUF."""
    at = 0 if rng.random() < 0.5 else rng.randrange(0, min(4096, len(data) - 8))
    return data[:at] + rng.getrandbits(64).to_bytes(8, "little") + data[at + 8 :]


def pickled(data: bytes, rng: random.Random) -> bytes:
    return pickle.dumps({"weight": [1.0] * 8, "run": rng.random()})


def deep(data: bytes, rng: random.Random) -> bytes:
    return b'{"a":' + b"[" * 200_000


MUTATIONS: dict[str, tuple[Mutation, ...]] = {
    "hf": (cut, flip, flip, flip, number, number, length, pickled, deep),
    "gguf": (cut, flip, flip, length, length, pickled, deep),
}


def main(kind: str, run_folder: Path, export: Path, count: int) -> None:
    run = open_run(str(run_folder))
    shard = min(path.name for path in export.iterdir() if path.name.startswith("model"))
    files = (GGUF,) if kind == "gguf" else ("config.json", INDEX, shard)
    ways = ExportAs(kind, quant="f32")
    check_files(run, export, ways)  # all that is imported late is there before memory is limited
    _limit()
    weights = [] if kind == "gguf" else _import(export, export.with_name("sound"))
    for turn in range(count):
        rng = random.Random(turn)
        copy = export.with_name(f"mutated-{kind}")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(export, copy)
        file = copy / files[turn % len(files)]
        mutation = rng.choice(MUTATIONS[kind])
        file.write_bytes(mutation(file.read_bytes(), rng))
        started = time.perf_counter()
        try:
            if kind == "gguf":
                check_files(run, copy, ways)
                said = ""
            else:
                said = "" if _import(copy, copy / "imported") != weights else "the same weights"
        except HandOffError as error:
            said = str(error)
        seconds = time.perf_counter() - started
        print(json.dumps({"file": file.name, "mutation": mutation.__name__, "said": said, "seconds": seconds}))


def _import(folder: Path, out: Path) -> list[str]:
    """The checksums of what was taken."""
    made = import_hf(folder, out, None, quiet)
    return sorted(tensor.checksum for tensor in open_checkpoint(made.checkpoint).manifest.tensors)


def _limit() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIB, used + GIB))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
