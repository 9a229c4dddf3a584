"""A lock on a run folder, which works on any file system and is released when its holder dies.

`flock` is not available on every cluster: NFS may not forward it, Lustre needs a mount option. So the lock is a file
that is created atomically and names its holder. Whether a holder on this machine is alive is asked of the kernel. A
holder on another host updates the file every BEAT seconds (a heartbeat), and is taken for dead if the file does not
change for STALE seconds by the waiting process's clock. Clocks of two hosts are never compared.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from dryvine.trainer.config import ConfigError
from dryvine.trainer.data.atomic import write_atomically

NAME = "run.lock"
BEAT, STALE = 5.0, 30.0


class Holder(NamedTuple):
    """The process that holds a lock. `machine` is equal for processes that see each other's process ids."""

    host: str
    machine: str
    pid: int
    started: str  # clock ticks after the machine's boot, since process ids are reused
    token: str

    @property
    def alive(self) -> bool:
        """Whether the process exists. Valid on the holder's machine only."""
        return self.started == _start_of(self.pid)


class RunLock:
    """The lock of a run folder, held by rank 0 during the run."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / NAME
        self._me = Holder(socket.gethostname(), _machine(), os.getpid(), _start_of(os.getpid()), secrets.token_hex(8))
        self._released = threading.Event()
        self._beats = 0

    @contextmanager
    def held(self, say: Callable[[str], None] = print) -> Iterator[RunLock]:
        """Hold the lock. Raises ConfigError if a live run holds it, or its folder cannot be made; `say` is called if
        finding out takes long."""
        folder = self._file.parent
        made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be made: {error.strerror}; set run.out to a folder that can") from None
        while not self._created(self._file):
            self._refuse_or_remove(_read(self._file), say)
        thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._released.set()
            thread.join()
            if self.mine:
                self._file.unlink()
            if made:
                with suppress(OSError):  # not empty: the run has begun
                    folder.rmdir()

    @property
    def mine(self) -> bool:
        """Whether this run still holds it. False if another run took it over, after this one stood for over STALE s."""
        holder = _read(self._file)
        return holder is not None and holder.token == self._me.token

    def _created(self, file: Path) -> bool:
        # Written under another name and linked, so that the file is never seen incomplete. A link fails if it exists.
        aside = self._file.with_name(f"{NAME}.{self._me.token}")
        write_atomically(aside, self._content())
        try:
            os.link(aside, file)
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        return True

    def _refuse_or_remove(self, holder: Holder | None, say: Callable[[str], None]) -> None:
        """Remove a dead holder's lock. `holder` None: the file has been deleted, or is not a lock. Raises ConfigError
        if the holder is alive."""
        if holder and (holder.alive if holder.machine == self._me.machine else self._changes(holder, say)):
            raise ConfigError(
                f"{self._file.parent}: this run is already in progress, process {holder.pid} on {holder.host}; "
                f"end that one, or set run.name for another run"
            )
        with self._removing():
            now = _read(self._file)
            if (now and now.token) == (holder and holder.token):
                self._file.unlink(missing_ok=True)

    @contextmanager
    def _removing(self) -> Iterator[None]:
        """Let only one process at a time remove a lock: of two that have read the dead holder's name, the second would
        remove the lock that the first has acquired since."""
        file, until = self._file.with_name(f"{NAME}.removing"), time.monotonic() + STALE
        while not self._created(file):
            if time.monotonic() > until:
                raise ConfigError(
                    f"{file}: left by a process that died while it took over the lock; remove it unless another run "
                    f"is starting now"
                )
            time.sleep(0.01)
        try:
            yield
        finally:
            file.unlink()

    def _changes(self, holder: Holder, say: Callable[[str], None]) -> bool:
        """Whether a holder on another machine updates the file within STALE seconds."""
        say(f"{self._file}: held by process {holder.pid} on {holder.host}; waiting {STALE:.0f} s for its heartbeat")
        before, until = _text(self._file), time.monotonic() + STALE
        while time.monotonic() < until:
            time.sleep(0.2)
            if _text(self._file) != before:
                return True
        return False

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            self._beats += 1
            if self.mine:
                with suppress(OSError):  # for example a full disk, which the next save reports
                    write_atomically(self._file, self._content())

    def _content(self) -> str:
        return json.dumps({**self._me._asdict(), "beats": self._beats}) + "\n"


def _read(file: Path) -> Holder | None:
    """The holder named in a lock; None if there is no lock, or its content is not valid."""
    try:
        content = json.loads(_text(file))
        return Holder(*(content[name] for name in Holder._fields))
    except (ValueError, KeyError, TypeError):
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _machine() -> str:
    """An id of this boot of the kernel and of this process's PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_of(pid: int) -> str:
    """When a process started, in clock ticks after boot; "" if it does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return _alive_elsewhere(pid)


def _alive_elsewhere(pid: int) -> str:
    """`_start_of` without /proc: "alive", or "" if the process does not exist."""
    if Path("/proc/self").exists():
        return ""
    try:
        os.kill(pid, 0)
    except OSError:
        return ""
    return "alive"
