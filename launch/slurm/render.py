"""Renders the script that sbatch takes.

The script is a template beside this file, package data, so what must be changed for a cluster can be read in one place.
All user input is quoted (`shlex`) or refused (`SlurmJob`), and substituted once: a value that looks like a placeholder
stays as it is.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from string import Template

from dryvine.comm.host import MALLOC
from dryvine.launch.slurm.job import JobError, SlurmJob, log_path, parse_time
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.manifest import NAME
from dryvine.trainer.config import Config

FIRST_SAVE = 120.0  # seconds that a save is taken to last before one was measured
SLACK = 60  # seconds: as much earlier than asked may SLURM send a signal, or later may it look at its clock
LONGEST_LEAD = 65535  # seconds, SLURM's limit of --signal


class _Script(Template):
    delimiter = "@"  # the shell has the dollar


def render(config: Config, words: Sequence[str], job: SlurmJob) -> str:
    """The script for `words`, the path of a config and its overrides, which resolve to `config`. Raises JobError."""
    _fits(config, job)
    template = _Script(Path(__file__).with_name("pretrain.sbatch").read_text())
    return template.substitute(
        directives="\n".join(f"#SBATCH --{directive}" for directive in _directives(config, job)),
        python=shlex.quote(python(job)),
        run=shlex.join(words),
        environment="\n".join(f"export {name}={shlex.quote(value)}" for name, value in _environment(config, job)),
        check=_check(job),
        step=1 if job.check else 0,  # srun numbers its steps from 0
        command=_lines([*_srun(config, job), *_inside(job), *(_ranks() if job.per_rank else _torchrun(job))]),
    )


def lead(config: Config) -> int:
    """Seconds before the time limit at which ranks are told to save: the longest that a step may wait, plus twice
    the longest save of this run so far (or FIRST_SAVE)."""
    measured = max(_saves(config.run.folder), default=0.0)
    return math.ceil(config.comm.deadline + (2 * measured or FIRST_SAVE)) + SLACK


def _saves(folder: Path) -> Iterator[float]:
    """Seconds that each kept checkpoint took to save; damaged ones are ignored."""
    for checkpoint in run_folder.complete(folder):
        with suppress(OSError, ValueError, AttributeError):
            yield float(json.loads((checkpoint / NAME).read_bytes()).get("seconds", 0.0))


def python(job: SlurmJob) -> str:
    """The path of this environment's interpreter, which hosts share; in a container, its own."""
    return "python3" if job.container else sys.executable


def _fits(config: Config, job: SlurmJob) -> None:
    if job.ranks != config.parallel.world:
        raise JobError(
            f"--nodes {job.nodes} x --gpus-per-node {job.gpus_per_node} are {job.ranks} ranks, but the config's layout "
            f"has {config.parallel.world}: give that many, or set parallel.pp/dp/ep"
        )
    nodes = config.comm.topology.nodes
    if nodes and nodes != (job.gpus_per_node,) * job.nodes:
        raise JobError(
            f"--nodes {job.nodes} x --gpus-per-node {job.gpus_per_node}, but comm.topology.nodes = {list(nodes)}: "
            "give as many of each, or leave comm.topology.nodes out, which SLURM tells the ranks"
        )
    limit, early = parse_time(job.time) if job.time else None, lead(config)
    if limit is not None and limit <= early:
        raise JobError(
            f"--time {job.time} is {limit} s, and ranks must be told to save {early} s before its end "
            "(comm.deadline and a save): give more, or lower comm.deadline"
        )


def _directives(config: Config, job: SlurmJob) -> Iterator[str]:
    yield f"job-name={job.name}"
    yield f"nodes={job.nodes}"
    yield f"ntasks-per-node={_tasks_per_node(job)}"
    if config.run.device != "cpu":
        yield f"gpus-per-node={job.gpus_per_node}"
    for name in ("partition", "account", "qos", "reservation", "constraint", "exclude", "time"):
        if value := getattr(job, name):
            yield f"{name}={value}"
    if job.cpus_per_rank:
        yield f"cpus-per-task={_cpus(job)}"
    else:
        yield "exclusive"
        yield "mem=0"  # all of a node's: without it a whole node comes with the partition's default for its CPUs
    if job.array:
        yield f"array=1-{job.array}%1"
    yield f"output={log_path(config.run.folder)}"
    yield "open-mode=append"
    yield "requeue"
    yield f"signal=B:USR1@{min(lead(config), LONGEST_LEAD)}"


def _cpus(job: SlurmJob) -> int:
    """CPUs of one task."""
    return job.cpus_per_rank * (1 if job.per_rank else job.gpus_per_node)


def _environment(config: Config, job: SlurmJob) -> Iterator[tuple[str, str]]:
    yield "CUDA_DEVICE_MAX_CONNECTIONS", "32"  # streams that wait must not hold up others
    yield "OMP_NUM_THREADS", str(job.cpus_per_rank or 1)
    yield "PYTHONUNBUFFERED", "1"
    # What torchrun's agent waits between SIGTERM and SIGKILL: as long as ranks may take to save.
    yield "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(lead(config))
    if job.interface:
        yield "NCCL_SOCKET_IFNAME", job.interface
        yield "GLOO_SOCKET_IFNAME", job.interface.removeprefix("=")
    if job.ib_hca:
        yield "NCCL_IB_HCA", job.ib_hca
    if config.run.device == "cpu":
        yield from MALLOC.items()


def _check(job: SlurmJob) -> str:
    """One doctor per node, which check each other's connections; a bad node fails the job before it starts."""
    if not job.check:
        return ""
    doctor = ['"$python" -m dryvine.launch.cli doctor --before-run', '"${run[@]}"']
    return _lines([*_tasks(job, 1), *_pyxis(job), *_inside(job), *doctor]) + " || exit 1\n"


def _tasks(job: SlurmJob, per_node: int) -> Iterator[str]:
    """srun of so many tasks a node. Their sum is given too: srun would take it from the job's SLURM_NTASKS, and then
    ignore another number for each node."""
    yield from ("srun", "--kill-on-bad-exit=1", f"--ntasks={per_node * job.nodes}", f"--ntasks-per-node={per_node}")


def _tasks_per_node(job: SlurmJob) -> int:
    """Of the job: its ranks, or one torchrun."""
    return job.gpus_per_node if job.per_rank else 1


def _srun(config: Config, job: SlurmJob) -> Iterator[str]:
    yield from _tasks(job, _tasks_per_node(job))
    # srun does not take --cpus-per-task from the job since SLURM 22.05.
    yield from (f"--cpus-per-task={_cpus(job)}", "--cpu-bind=cores") if job.cpus_per_rank else ("--cpu-bind=none",)
    if job.per_rank and config.run.device != "cpu":
        yield "--gpu-bind=none"  # ranks of a node reach each other's memory
    yield from _pyxis(job)


def _pyxis(job: SlurmJob) -> Iterator[str]:
    match job.image:
        case "pyxis", image:
            yield f"--container-image={shlex.quote(image)}"
            yield '--container-workdir="$PWD"'
            mounts = "$PWD:$PWD"
            yield f'--container-mounts="{mounts}"' + (f",{shlex.quote(job.mounts)}" if job.mounts else "")


def _inside(job: SlurmJob) -> Iterator[str]:
    match job.image:
        case "apptainer", image:
            yield from ("apptainer", "exec", "--nv", '--bind "$PWD"')
            if job.mounts:
                yield f"--bind {shlex.quote(job.mounts)}"
            yield shlex.quote(image)


def _ranks() -> Iterator[str]:
    yield from ('"$python" -m dryvine.trainer', '"${run[@]}"')


def _torchrun(job: SlurmJob) -> Iterator[str]:
    """An agent a node. The store is served by node 0, of which each task must be told: names and addresses of hosts
    differ on many clusters."""
    host = '"is_host=$((SLURM_NODEID == 0))"'
    agent = _lines(
        [
            'exec "$0" -m torch.distributed.run',
            f"--nnodes={job.nodes} --nproc-per-node={job.gpus_per_node}",
            '--rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"',
            f'--rdzv-id="$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}" --rdzv-conf={host}',
            '-m dryvine.trainer "$@"',
        ]
    )
    yield from (f"sh -c '{agent}'", '"$python"', '"${run[@]}"')


def _lines(words: Sequence[str]) -> str:
    """A command with one word or option per line."""
    return " \\\n    ".join(words)
