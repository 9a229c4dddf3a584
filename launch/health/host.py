"""A host without its GPUs: versions, limits, shared memory, disk, ports. Imports no torch.

Each check yields findings and never raises: what cannot be read is a finding too. The limits are those at which runs
have failed: NCCL and gloo open a socket per peer, rank 0's store one per rank, pinned and registered memory is locked,
and containers have 64 MiB of /dev/shm by default.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dryvine.launch.health.finding import Finding, judged

PACKAGES = ("torch", "triton", "nvidia-nccl-cu13", "nvidia-nccl-cu12", "transformer-engine", "deepspeed", "mpi4py")
FILES = 4096  # open files, at least
SHARED = 1 << 30  # bytes of /dev/shm, at least
PROBE = 128 << 20  # bytes written to measure a disk
SLOW = 0.1  # GB/s under which a slow disk is noted


def versions() -> Iterator[Finding]:
    """Versions of the interpreter and of the packages that affect results."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield Finding("ok", "versions", ", ".join(found))


def limits(world: int, locks_memory: bool) -> Iterator[Finding]:
    """`world`: ranks of the run; `locks_memory`: there are GPUs or InfiniBand devices."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max(FILES, 2 * world)
    raised = f"`ulimit -n {needed}`" if hard == resource.RLIM_INFINITY or hard >= needed else "nofile in limits.conf"
    yield judged(
        soft == resource.RLIM_INFINITY or soft >= needed,
        "open files",
        f"{_limit(soft)} of {needed} that {world} ranks may need",
        f"raise it with {raised}",
    )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield judged(
        locked == resource.RLIM_INFINITY,
        "locked memory",
        _limit(locked, 1 << 20, " MiB"),
        "`ulimit -l unlimited`, in SLURM PropagateResourceLimitsExcept=MEMLOCK, in a container --ulimit memlock=-1",
        "bad" if locks_memory else "note",
    )
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError as error:
        yield Finding("unknown", "/dev/shm", str(error))
        return
    yield judged(size >= SHARED, "/dev/shm", f"{size / 2**30:.2g} GiB", "in a container --ipc=host or --shm-size=16g")


def _limit(value: int, unit: int = 1, name: str = "") -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value // unit}{name}"


def disk(folder: Path, checkpoint_bytes: int = 0, kept: int = 1) -> Iterator[Finding]:
    """Whether the run folder can be written, has room for `kept` checkpoints and one more, and its write speed from
    this host."""
    what = f"disk of {folder}"
    home = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    needed, free = checkpoint_bytes * (kept + 1), shutil.disk_usage(home).free
    room = f"{free / 1e9:.1f} GB free" + (f", checkpoints need {needed / 1e9:.1f}" if needed else "")
    yield judged(free >= max(needed, PROBE), f"room on the {what}", room, "free some, or set run.out elsewhere")
    if free < PROBE:
        return
    try:
        speed = _written_per_second(home) / 1e9
    except OSError as error:
        yield Finding("bad", what, f"cannot be written: {error}", "set run.out to a folder that this host can write")
        return
    took = f"; a checkpoint takes {checkpoint_bytes / 1e9 / speed:.0f} s from one host" if checkpoint_bytes else ""
    yield judged(speed >= SLOW, what, f"{speed:.2g} GB/s{took}", "checkpoints and data will be slow", "note")


def _written_per_second(folder: Path) -> float:
    """Bytes a second written through to the disk, measured with PROBE bytes."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        for _ in range(PROBE // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    return PROBE / (time.perf_counter() - started)


def ports(address: str, port: int) -> Iterator[Finding]:
    """Whether rank 0's port is free, asked on rank 0's host."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except (OSError, OverflowError) as error:
            yield Finding("bad", f"port {port} of {address}", str(error), "set MASTER_PORT to a free one")
            return
    yield Finding("ok", f"port {port} of {address}", "free")


def name_resolves() -> Iterator[Finding]:
    """Whether this host's name resolves to an address that others can reach: gloo uses it unless told an interface."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = ""
    yield judged(
        bool(address) and not address.startswith("127."),
        "host name",
        f"{name} is {address or 'unknown'}",
        "on several nodes set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface to the others",
        "note",
    )
