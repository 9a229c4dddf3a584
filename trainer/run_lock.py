"""One run folder, one run: a lock that a dead run does not keep, on any file system.

`flock` is not to be had on every cluster: NFS may not pass it on, Lustre needs a mount option. So the lock is a file
under a name that only one can give it, and says who holds it. Whether a holder on this machine lives, the kernel knows.
Of one elsewhere only the file can tell: its holder changes it every BEAT seconds, and one that does not change for
STALE seconds, by the clock of who waits, is dead. Clocks of two hosts are never compared.
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
    """Who holds a lock. `machine` is the same for processes that see each other's ids."""

    host: str
    machine: str
    pid: int
    started: str  # clock ticks after the machine's boot: ids are used again
    token: str

    @property
    def alive(self) -> bool:
        """Of a holder on this machine."""
        return self.started == _start_of(self.pid)


class RunLock:
    """Held by rank 0 while a run goes on."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / NAME
        self._me = Holder(socket.gethostname(), _machine(), os.getpid(), _start_of(os.getpid()), secrets.token_hex(8))
        self._released = threading.Event()
        self._beats = 0

    @contextmanager
    def held(self, say: Callable[[str], None] = print) -> Iterator[RunLock]:
        """Raises ConfigError at once if another run that lives holds it; `say` tells when that takes a while."""
        folder = self._file.parent
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
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
        """False if another run has taken this one for dead: it was stopped for longer than STALE."""
        holder = _read(self._file)
        return holder is not None and holder.token == self._me.token

    def _created(self, file: Path) -> bool:
        # Written aside and linked: whoever sees the file sees all of it. A link fails if its name is taken.
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
        """`holder` None: the file is gone by now, or nothing that a run has written."""
        if holder and (holder.alive if holder.machine == self._me.machine else self._changes(holder, say)):
            raise ConfigError(
                f"{self._file.parent}: this run is going on already, process {holder.pid} on {holder.host}; "
                f"end that one, or set run.name for another run"
            )
        with self._removing():
            now = _read(self._file)
            if (now and now.token) == (holder and holder.token):
                self._file.unlink(missing_ok=True)

    @contextmanager
    def _removing(self) -> Iterator[None]:
        """Only one process at a time removes a lock: of two that had both read the dead holder's name, the second
        would remove the lock that the first has taken since."""
        file, until = self._file.with_name(f"{NAME}.removing"), time.monotonic() + STALE
        while not self._created(file):
            if time.monotonic() > until:
                raise ConfigError(
                    f"{file}: left by a process that died just here; remove it if no other run starts now"
                )
            time.sleep(0.01)
        try:
            yield
        finally:
            file.unlink()

    def _changes(self, holder: Holder, say: Callable[[str], None]) -> bool:
        """Whether a holder on another machine shows in STALE seconds that it lives."""
        say(f"{self._file}: held by process {holder.pid} on {holder.host}; waiting {STALE:.0f} s for it to show life")
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
                with suppress(OSError):  # a disk that is full: the save will say so
                    write_atomically(self._file, self._content())

    def _content(self) -> str:
        return json.dumps({**self._me._asdict(), "beats": self._beats}) + "\n"


def _read(file: Path) -> Holder | None:
    """None if there is no lock, or none that anybody holds."""
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
    """Of this boot of this kernel, and of this process's view of process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_of(pid: int) -> str:
    """When a process started; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return _alive_elsewhere(pid)


def _alive_elsewhere(pid: int) -> str:
    """Without /proc: "alive" or ""."""
    if Path("/proc/self").exists():
        return ""
    try:
        os.kill(pid, 0)
    except OSError:
        return ""
    return "alive"
