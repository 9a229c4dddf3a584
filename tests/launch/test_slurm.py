"""The rendered script under a real SLURM of virtual nodes: it trains, and a run survives what SLURM does to jobs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dryvine.trainer.checkpoint import run_folder
from tests.support import slurm_bed
from tests.support.launching import BIN, MODULE, environment, losses, together, words
from tests.support.slurm_bed import Slurm, until

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(slurm_bed.missing()), reason=slurm_bed.missing() or "-")]
EXPERTS = ("parallel.ep=2",)  # four ranks


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm_bed.cluster(tmp_path_factory.mktemp("slurm") / "bed") as cluster:
        yield cluster


def submit(slurm: Slurm, *words: str) -> str:
    """`dryvine launch slurm`. Returns the job's number."""
    command = [sys.executable, "-m", "dryvine.launch.cli", "launch", "slurm", *words, "--cpus-per-rank", "1"]
    env = {**environment(), "SLURM_CONF": slurm.env["SLURM_CONF"], "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = re.match(r"job (\d+): output in", done.stdout)
    assert found, done.stdout
    return found[1]


def printed(out: Path, job: str) -> str:
    log = out / "tiny" / f"slurm-{job}.out"
    return log.read_text() if log.exists() else ""


@pytest.mark.parametrize(
    ("layout", "nodes"),
    [
        ((), ("2", "1")),
        (EXPERTS, ("2", "2")),
        ((*EXPERTS, "--per-rank"), ("4", "1")),
        ((*EXPERTS, "--per-rank"), ("2", "2")),
    ],
)
def test_two_and_four_nodes_train_as_one_does(
    slurm: Slurm, corpus: Path, tmp_path: Path, layout: tuple[str, ...], nodes: tuple[str, str]
) -> None:
    count, per_node = nodes
    options = ("--nodes", count, "--gpus-per-node", per_node, "--partition", "main")
    job = submit(slurm, *words(corpus, tmp_path / "slurm", *layout), *options)
    state = slurm.wait(job, ("COMPLETED", "FAILED", "CANCELLED"))
    assert state == "COMPLETED", printed(tmp_path / "slurm", job)
    assert f"all {count} nodes: config and data: " in printed(tmp_path / "slurm", job), "doctor ran once on each"
    run = words(corpus, tmp_path / "one", *(word for word in layout if "=" in word))
    world = str(int(count) * int(per_node))
    ((code, text),) = together([(str(BIN / "torchrun"), "--nproc-per-node", world, *MODULE, *run)], environment())
    assert code == 0, text
    assert losses(tmp_path / "slurm" / "tiny") == losses(tmp_path / "one" / "tiny")


def test_time_limit_requeue_and_scancel_are_survived(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    given = words(corpus, tmp_path, "comm.deadline=30", "run.checkpoint_every=1000", "run.eval_every=100000")
    options = ("--nodes", "2", "--gpus-per-node", "1", "--no-check")
    rows = tmp_path / "tiny" / "metrics.jsonl"

    def steps() -> int:
        return rows.read_text().count("\n") if rows.exists() else 0

    # The signal comes 210 s before the limit, or up to a minute earlier; then SLURM would kill the job.
    job = submit(slurm, *given, "run.steps=100000", *options, "--time", "5")
    until(lambda: steps() >= 2, 240, lambda: printed(tmp_path, job))
    until(lambda: "stopped by a signal after step" in printed(tmp_path, job), 200, lambda: printed(tmp_path, job))
    slurm.wait(job, ("PENDING", "REQUEUED"))
    stopped = max(map(int, re.findall(r"after step (\d+)", printed(tmp_path, job))))
    assert run_folder.newest(tmp_path / "tiny") == run_folder.named(tmp_path / "tiny", stopped)

    # Requeued by itself: it goes on from there. An operator requeues it once more, without a word to the ranks.
    slurm.ask("scontrol", "update", f"jobid={job}", "StartTime=now")
    until(
        lambda: f"after step {stopped}" in printed(tmp_path, job).partition("start 2")[2],
        240,
        lambda: printed(tmp_path, job),
    )
    until(lambda: steps() > stopped, 100, lambda: printed(tmp_path, job))
    slurm.ask("scontrol", "requeue", job)
    until(lambda: slurm.state(job) == "PENDING", 60, lambda: slurm.state(job))
    slurm.ask("scontrol", "update", f"jobid={job}", "StartTime=now")
    until(lambda: "start 3" in printed(tmp_path, job), 100, lambda: printed(tmp_path, job))
    until(lambda: printed(tmp_path, job).count("resuming") == 2, 240, lambda: printed(tmp_path, job))

    # scancel, and the same command again, to the end.
    slurm.ask("scancel", job)
    slurm.wait(job, ("CANCELLED", "GONE", "FAILED", "COMPLETED"))
    newest = run_folder.newest(tmp_path / "tiny")
    assert newest is not None
    done = run_folder.step_of(newest)
    again = submit(slurm, *given, f"run.steps={done + 3}", *options)
    assert slurm.wait(again, ("COMPLETED", "FAILED")) == "COMPLETED", printed(tmp_path, again)
    assert f"resuming {tmp_path}/tiny after step {done}" in " ".join(printed(tmp_path, again).split())
    assert steps() == done + 3


def test_the_next_task_of_an_array_goes_on(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    """Each task has a log of its own. What is left of the array is cancelled once the run has ended."""
    given = words(corpus, tmp_path, "comm.deadline=30", "run.checkpoint_every=1000", "run.eval_every=100000")
    options = ("--nodes", "2", "--gpus-per-node", "1", "--no-check", "--array", "3", "--time", "5")
    # So many steps that the first task cannot end them before its signal.
    job = submit(slurm, *given, "run.steps=100000", *options)

    def logs() -> str:
        return " ".join(" ".join(path.read_text().split()) for path in sorted((tmp_path / "tiny").glob("slurm-*.out")))

    until(lambda: "stopped by a signal after step" in logs(), 240, logs)
    stopped = re.findall(r"after step (\d+)", logs())[-1]
    until(lambda: f"resuming {tmp_path}/tiny after step {stopped}" in logs(), 100, logs)
    assert slurm.ask("squeue", "-h", "-j", job, "-o", "%K %T").splitlines()[-1].startswith("2 ")
    slurm.ask("scancel", job)
