"""DeepSpeed's CPU Adam, compiled once for each kind of machine and cached.

torch's extension builder marks a build with a file that outlives a killed builder, and later builders then wait for it
for ever; and its cache has one entry for all machines of a shared home, though it is compiled for the vector
instructions of one. So a child process builds in a folder of its own, within a time limit, and the result is renamed
into a cache keyed by versions and CPU. The ranks of a node wait for the one that builds at a kernel lock, which is
released when its holder dies; where the file system has no locks each rank builds for itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

from dryvine.comm.extras import lacking

NAME = "cpu_adam"
# Seconds; less than the time limit of the rendezvous (comm.world.PATIENCE).
LIMIT = 400.0


class CpuAdamOp(Protocol):
    """The part of DeepSpeed's compiled module that is called here."""

    create_adam: Callable[..., int]
    adam_update: Callable[..., int]


def load_cpu_adam(limit: float = LIMIT) -> CpuAdamOp | str:
    """The module, compiled at first use on a machine (minutes; at most `limit` seconds), or why it is not available."""
    try:
        made = _cache() / f"{NAME}.so"
        with _one_at_a_time(made.parent, limit):
            if not made.exists():
                _build(made, limit)
        spec = importlib.util.spec_from_file_location(NAME, made)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return cast(CpuAdamOp, module)
    except (OSError, ImportError, RuntimeError) as error:
        said = lacking(error) if isinstance(error, ImportError) else str(error)
        return f"{type(error).__name__}: {(said.splitlines() or [''])[0]}"


def _cache() -> Path:
    """The cache folder for these versions and this CPU. Raises ImportError without DeepSpeed."""
    versions = [importlib.metadata.version(package) for package in ("deepspeed", "torch")]
    cpu = next((line for line in _cpu_info() if line.startswith(("flags", "Features"))), platform.processor())
    key = hashlib.sha256("\n".join((*versions, sys.version, platform.machine(), cpu)).encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "dryvine" / f"{NAME}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


@contextmanager
def _one_at_a_time(folder: Path, limit: float) -> Iterator[None]:
    until = time.monotonic() + limit
    with open(folder / "lock", "w") as lock:
        while not _locked(lock.fileno()):
            if time.monotonic() > until:
                raise RuntimeError(f"another process has been compiling it for {limit:g} s")
            time.sleep(0.2)
        yield


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _build(made: Path, limit: float) -> None:
    """Compile it in a child. Raises RuntimeError with the child's last line."""
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        # ninja is beside the interpreter, whose folder need not be in PATH.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        environment = os.environ | {"TORCH_EXTENSIONS_DIR": folder, "PATH": path}
        command = [sys.executable, "-m", "dryvine.trainer.cpu_adam"]
        # A process group of its own, so that the compilers that it starts are ended with it.
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, process_group=0) as child:  # fmt: skip
            try:
                said, _ = child.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"not compiled within {limit:g} s") from None
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, 9)
        if child.returncode:
            raise RuntimeError((said.strip().splitlines() or [f"exit code {child.returncode}"])[-1])
        (Path(folder) / NAME / made.name).replace(made)


def main() -> None:
    """Compile it below TORCH_EXTENSIONS_DIR."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from deepspeed.ops.op_builder import CPUAdamBuilder

        CPUAdamBuilder().load(verbose=False)


if __name__ == "__main__":
    main()
