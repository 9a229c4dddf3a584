"""The batch script: what SLURM and the shell read of a user's words, without a SLURM."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dryvine.launch.slurm.job import JobError, SlurmJob, parse_time
from dryvine.launch.slurm.render import FIRST_SAVE, SLACK, lead, render
from dryvine.trainer.config import Config

ROOT = Path(__file__).parents[2]
NASTY = (
    "a b",
    "$(touch pwned)",
    "`touch pwned`",
    "'; touch pwned; '",
    '"',
    "\\",
    "\n touch pwned",
    "@{python}",
    "*",
    "-n",
    "#",
)


def job(**changed: object) -> SlurmJob:
    given: dict[str, object] = {"nodes": 2, "gpus_per_node": 2, "name": "tiny", **changed}
    return SlurmJob(**given)  # type: ignore[arg-type]


@pytest.fixture
def four(tiny: Callable[..., Config]) -> Config:
    """Four ranks."""
    return tiny("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe")


def directives(script: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.M)
    return dict(found)


def test_it_asks_for_what_the_user_did(four: Config) -> None:
    script = render(
        four, ["c.toml"], job(partition="gpu,big", account="a1", time="1-12:00:00", array=3, exclude="n[1-3]")
    )
    asked = directives(script)
    assert asked["nodes"] == "2"
    assert asked["partition"] == "gpu,big"
    assert asked["time"] == "1-12:00:00"
    assert asked["array"] == "1-3%1"
    assert asked["exclude"] == "n[1-3]"
    assert asked["output"] == f"{four.run.folder}/slurm-%j.out"
    assert "requeue" in asked
    assert "exclusive" in asked
    assert "gpus-per-node" not in asked  # run.device is cpu
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=32\n" in script


def test_a_gpu_run_asks_for_gpus_and_binds_ranks(four: Config) -> None:
    config = four.model_copy(update={"run": four.run.model_copy(update={"device": "cuda"})})
    node = render(config, ["c.toml"], job(cpus_per_rank=8, interface="ib0", ib_hca="=mlx5_0:1,mlx5_1"))
    asked = directives(node)
    assert (asked["gpus-per-node"], asked["ntasks-per-node"], asked["cpus-per-task"]) == ("2", "1", "16")
    assert "export NCCL_IB_HCA==mlx5_0:1,mlx5_1\n" in node or "export NCCL_IB_HCA='=mlx5_0:1,mlx5_1'\n" in node
    assert "export GLOO_SOCKET_IFNAME=ib0\n" in node
    exact = render(config, ["c.toml"], job(interface="=ib0,ib1"))
    assert "export NCCL_SOCKET_IFNAME==ib0,ib1\n" in exact or "export NCCL_SOCKET_IFNAME='=ib0,ib1'\n" in exact
    assert "export GLOO_SOCKET_IFNAME=ib0,ib1\n" in exact
    rank = render(config, ["c.toml"], job(cpus_per_rank=8, per_rank=True))
    asked = directives(rank)
    assert (asked["ntasks-per-node"], asked["cpus-per-task"]) == ("2", "8")
    assert "--gpu-bind=none" in rank
    assert "torch.distributed.run" not in rank


def test_an_interface_to_avoid_is_refused_since_gloo_would_take_it() -> None:
    with pytest.raises(JobError, match="--interface"):
        job(interface="^docker0")
    assert job(ib_hca="^mlx5_0").ib_hca == "^mlx5_0", "of NCCL alone"


@pytest.mark.parametrize("per_rank", [False, True])
def test_the_check_is_one_task_a_node_whatever_the_job_has(four: Config, per_rank: bool) -> None:
    """srun takes the number of all tasks from the job unless it is told, and then ignores that of each node."""
    script = render(four, ["c.toml"], job(per_rank=per_rank)).replace(" \\\n", "")
    check, run = (line.split() for line in script.splitlines() if line.startswith("srun"))
    assert {"--ntasks=2", "--ntasks-per-node=1"} <= set(check)
    assert ({"--ntasks=4", "--ntasks-per-node=2"} if per_rank else {"--ntasks=2", "--ntasks-per-node=1"}) <= set(run)


def test_whole_nodes_come_with_all_of_their_memory(four: Config) -> None:
    assert directives(render(four, ["c.toml"], job()))["mem"] == "0"
    assert "mem" not in directives(render(four, ["c.toml"], job(cpus_per_rank=4)))


@pytest.mark.parametrize("container", ["pyxis:nvcr.io#nvidia/pytorch:25.01", "apptainer:/images/a b.sif"])
def test_containers(four: Config, container: str) -> None:
    script = render(four, ["c.toml"], job(container=container, mounts="/data:/data"))
    kind, _, image = container.partition(":")
    assert shlex.quote(image) in script
    assert ("--container-mounts=" in script) == (kind == "pyxis")
    assert "python=python3\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_the_signal_comes_a_step_and_a_save_before_the_end(four: Config) -> None:
    first = lead(four)
    assert first == four.comm.deadline + FIRST_SAVE + SLACK
    assert directives(render(four, ["c.toml"], job()))["signal"] == f"B:USR1@{first}"
    for step, manifest in ((1, json.dumps({"seconds": 12.5})), (2, json.dumps({"seconds": 45.0})), (3, '{"secon')):
        checkpoint = four.run.folder / f"checkpoints/step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text(manifest)
    assert lead(four) == four.comm.deadline + 90 + SLACK


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"nodes": 3}, "3 x --gpus-per-node 2 are 6 ranks, but the config's layout has 4"),
        ({"time": "4"}, "--time 4 is 240 s, and ranks must be told to save"),
    ],
)
def test_a_job_that_does_not_fit_its_run(four: Config, changed: dict[str, object], says: str) -> None:
    with pytest.raises(JobError, match=re.escape(says)):
        render(four, ["c.toml"], job(**changed))


@pytest.mark.parametrize(
    "name", ["partition", "account", "qos", "reservation", "constraint", "exclude", "name", "time"]
)
@pytest.mark.parametrize("word", NASTY)
def test_what_slurm_does_not_take_is_refused(name: str, word: str) -> None:
    with pytest.raises(JobError, match=f"--{name} "):
        job(**{name: word})


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("account", "abc@h100"),
        ("partition", "gpu,big"),
        ("constraint", "[rack1|rack2]"),
        ("constraint", "(h100&ib)|h200"),
        ("constraint", "[rack1*2&rack2*4]"),
        ("exclude", "n[1-3],m07"),
    ],
)
def test_what_clusters_have_is_passed_on(four: Config, name: str, word: str) -> None:
    assert directives(render(four, ["c.toml"], job(**{name: word})))[name] == word


def test_a_job_without_a_limit_is_not_too_short(four: Config) -> None:
    assert directives(render(four, ["c.toml"], job(time="UNLIMITED")))["time"] == "UNLIMITED"


def test_nodes_of_the_config_are_those_of_the_job(tiny: Callable[..., Config]) -> None:
    config = tiny("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", "comm.topology.nodes=[2,2]")
    render(config, ["c.toml"], job())
    with pytest.raises(JobError, match=r"--nodes 4 x --gpus-per-node 1, but comm\.topology\.nodes = \[2, 2\]"):
        render(config, ["c.toml"], job(nodes=4, gpus_per_node=1))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("UNLIMITED", None),
        ("infinite", None),
        ("0", None),
        ("90", 5400),
        ("90:30", 5430),
        ("2:00:00", 7200),
        ("1-0", 86400),
        ("1-2:30", 95400),
        ("1-2:30:15", 95415),
    ],
)
def test_slurms_ways_to_write_a_time(text: str, value: int | None) -> None:
    assert parse_time(text) == value


@pytest.mark.parametrize("text", ["1:2:3:4", "soon", "-5", "1-", "9" * 30, "1:60x"])
def test_times_that_slurm_does_not_take(text: str) -> None:
    with pytest.raises(JobError, match="--time"):
        parse_time(text)


def test_the_shell_reads_every_word_as_it_was_given(four: Config, tmp_path: Path) -> None:
    """Runs the script against stand-ins for SLURM's commands, srun writing down its words."""
    tools, seen = tmp_path / "tools", tmp_path / "seen"
    tools.mkdir()
    (tools / "srun").write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {seen}\n')
    (tools / "scontrol").write_text("#!/bin/sh\necho NodeAddr=10.0.0.1 n0\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    words = ["configs/my run.toml", *(f"data.source={word}" for word in NASTY)]
    script = render(four, words, job(per_rank=True, check=False))
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-1]"}
    done = subprocess.run(["bash"], input=script, env=env, text=True, capture_output=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    read = seen.read_text().split("\0")[:-1]
    assert read[read.index("dryvine.trainer") + 1 :] == words
    assert not (tmp_path / "pwned").exists()


@pytest.mark.long
def test_it_renders_from_an_installed_wheel(tmp_path: Path) -> None:
    """Built of a copy, and imported with this environment's packages but without its editable install."""
    copy, site = tmp_path / "copy", tmp_path / "site"
    for room in ("comm", "parallel", "trainer", "launch"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=copy, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("dryvine-*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    words = ["launch", "slurm", str(ROOT / "configs/tiny_cpu.toml"), "--nodes=2", "--gpus-per-node=2", "--dry-run"]
    env = {"PYTHONPATH": f"{site}:{sysconfig.get_path('purelib')}", "PATH": os.environ["PATH"]}
    command = [sys.executable, "-S", "-m", "dryvine.launch.cli", *words]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n")
    assert directives(done.stdout)["nodes"] == "2"
    assert not (tmp_path / "runs").exists(), "a dry run leaves nothing behind"
