"""Which rank a process is, from what each launcher sets; the real launchers are in tests/launch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dryvine.comm.place import PORTS, LaunchedRank, PlaceError, find_place, first_host, host_address
from dryvine.comm.topology import TopologyConfig, discover

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "7",
    "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "b", "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "70", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
ORDERED = {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}  # of a daemon that srun started


def test_torchrun_and_deepspeed() -> None:
    assert find_place(TORCHRUN) == LaunchedRank(5, 8, 1, "a", 7, "torchrun")
    assert find_place(DEEPSPEED) == LaunchedRank(2, 4, 0, "b", 29500, "deepspeed")
    assert discover(4, TopologyConfig(), DEEPSPEED).nodes == ((0, 1), (2, 3))


def test_torchruns_names_come_before_those_of_the_job_it_runs_in() -> None:
    assert find_place({**ORDERED, "PMI_SIZE": "2", **TORCHRUN}) == find_place(TORCHRUN)


def test_a_task_of_srun() -> None:
    place = find_place(SRUN)
    assert (place.rank, place.world, place.local_rank, place.address) == (3, 4, 1, "gpu007")
    assert place.port in PORTS
    assert find_place({**SRUN, "SLURM_STEP_ID": "1"}).port != place.port
    assert find_place({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "80"}).address == "10.0.0.1"


def test_a_shell_in_a_job_is_alone() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "3", "SLURM_TASKS_PER_NODE": "8(x2)"}
    assert find_place(batch).world == 1
    assert find_place({}) == LaunchedRank()


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu007", "gpu007"),
        ("gpu[007-012,20],login", "gpu007"),
        ("a1,a2", "a1"),
        ("r[0-1]n[2-3]", "r0n2"),
        ("gpu[3]-ib", "gpu3-ib"),
    ],
)
def test_the_first_host_of_a_compressed_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "not MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "ranks are counted from 0"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK = 'one' is not a number"),
        ({**SRUN, "SLURM_LOCALID": ""}, "SLURM_LOCALID = '' is not a number"),
    ],
)
def test_what_makes_no_sense_is_named(env: dict[str, str], says: str) -> None:
    with pytest.raises(PlaceError, match=says):
        find_place(env)


def test_mpirun_without_mpi4py_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(PlaceError, match=r'pip install "dryvine\[mpi\]" for this MPI'):
        find_place({"OMPI_COMM_WORLD_SIZE": "4"})


def test_the_address_of_the_interface_that_gloo_shall_use() -> None:
    assert host_address({"GLOO_SOCKET_IFNAME": "lo"}) == "127.0.0.1"
    assert host_address({"GLOO_SOCKET_IFNAME": "none0"}).count(".") == 3


def test_another_mpis_mpirun_is_noticed() -> None:
    code = "from dryvine.comm.place import find_place; find_place({'OMPI_COMM_WORLD_SIZE': '4'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "mpi4py sees one: it is built for another MPI" in done.stderr
