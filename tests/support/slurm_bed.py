"""A real SLURM on this machine: slurmctld and several slurmd, each a virtual node, from Debian's packages.

Configuration, munge key and socket, state, spool and logs lie in a temporary folder, ports are free ones, and the
daemons are children of the test, ended by their own pid: nothing under /etc is read or written, and two beds may run
at once. Needs root, as slurmd does to start a user's job; `missing()` says what is missing.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dryvine.comm.host import stop_with

TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scancel", "squeue", "scontrol")

CONFIG = """\
ClusterName=dryvine
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=n[0-{last}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs=4
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no SLURM here; empty if there can."""
    if os.geteuid() != 0:
        return "slurmd needs root"
    absent = [tool for tool in TOOLS if not shutil.which(tool)]
    return f"SLURM needs {', '.join(absent)}: apt-get install slurm-wlm munge" if absent else ""


@dataclass(frozen=True)
class Slurm:
    """A running cluster. `env` is what its commands need."""

    folder: Path
    env: dict[str, str]

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}{done.stdout}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ...; of a job that is forgotten, GONE."""
        done = subprocess.run(
            ("scontrol", "show", "job", "-o", job), env=self.env, capture_output=True, text=True, check=False
        )
        words = dict(word.partition("=")[::2] for word in done.stdout.split())
        return words.get("JobState", "GONE")

    def wait(self, job: str, states: tuple[str, ...], deadline: float = 240) -> str:
        return until(lambda: (s := self.state(job)) in states and s, deadline, lambda: f"job {job} {self.state(job)}")


def until(found: Callable[[], str | bool], deadline: float, why: Callable[[], str]) -> str:
    """The first true answer of `found`. Fails with `why` after `deadline` seconds."""
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        if answer := found():
            return str(answer)
        time.sleep(0.3)
    raise AssertionError(f"not in {deadline:g} s: {why()}")


@contextmanager
def cluster(folder: Path, nodes: int = 4) -> Iterator[Slurm]:
    """A cluster of `nodes` virtual nodes n0, n1, ... of four CPUs."""
    (folder / "state").mkdir(parents=True)
    controller, *ports = _free_ports(nodes + 1)
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(
            folder=folder,
            host=socket.gethostname(),
            controller=controller,
            last=nodes - 1,
            ports=f"{ports[0]}-{ports[-1]}",
        )
    )
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    slurm = Slurm(folder, {**clean, "SLURM_CONF": str(config)})
    with ExitStack() as daemons:
        _munge(folder, daemons)
        _start(["slurmctld", "-D", "-i", "-f", str(config)], folder, slurm.env, daemons)
        for i in range(nodes):
            _start(["slurmd", "-D", "-N", f"n{i}", "-f", str(config)], folder, slurm.env, daemons)
        idle = ("sinfo", "-h", "-t", "idle", "-o", "%D")

        def all_idle() -> bool:
            done = subprocess.run(idle, env=slurm.env, capture_output=True, text=True, check=False)
            return done.stdout.strip() == str(nodes)

        until(all_idle, 60, lambda: "nodes idle: " + (folder / "slurmctld.log").read_text()[-2000:])
        try:
            yield slurm
        finally:  # jobs outlive their daemons
            slurm.ask("scancel", "--user=root")
            until(lambda: not slurm.ask("squeue", "-h"), 60, lambda: slurm.ask("squeue"))


def _free_ports(count: int) -> list[int]:
    """Consecutive, below those that Linux gives to clients."""
    for first in range(20500 + os.getpid() % 4000, 30000, count):
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
        return list(range(first, first + count))
    raise AssertionError("no free ports")


def _munge(folder: Path, daemons: ExitStack) -> None:
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder}/munge.{end}" for option, end in files.items()]
    _start(["munged", "--foreground", "--force", *options], folder, dict(os.environ), daemons)
    until(lambda: (folder / "munge.socket").exists(), 20, lambda: (folder / "munge.log").read_text())


def _start(command: list[str], folder: Path, env: dict[str, str], daemons: ExitStack) -> None:
    """End it when `daemons` close: by its own pid, kindly first."""
    parent = os.getpid()
    with (folder / f"{command[0]}.out").open("a") as out:
        # A test that is killed leaves no daemon behind.
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, preexec_fn=lambda: stop_with(parent))

    def end() -> None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    daemons.callback(end)
