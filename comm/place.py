"""This process among those that a launcher started: its rank, and where rank 0 is found. Imports no torch.

Launchers are tried in a fixed order. torchrun's and DeepSpeed's names (`RANK`, `WORLD_SIZE`) come first: whoever sets
them has decided, also inside a SLURM or MPI job. MPI comes before SLURM, since mpirun's daemons are SLURM tasks
themselves and their ranks inherit SLURM's numbers, which are those of the daemons. Of MPI only the names that say that
it is there are read; the numbers are asked of MPI itself, so that any MPI will do.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dryvine.comm.extras import install
from dryvine.comm.topology import Topology, by_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

MPI_NAMES = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_SIZE", "PALS_RANKID")
PMI_NAMES = ("PMI_SIZE", "PMIX_RANK")  # srun sets them too, for programs that call MPI
PORTS = range(20000, 30000)  # below Linux's ephemeral ports


class PlaceError(ValueError):
    """The launcher's variables are inconsistent: which one, and what to do."""


@dataclass(frozen=True)
class LaunchedRank:
    """`local_rank` counts on this host. `port` 0 is one that rank 0 chooses and tells over MPI; at another one rank 0
    serves the ranks' store, or, if `served`, the launcher does, for all `attempt`s that it makes. `topology` is that of
    an MPI that was asked; other launchers' is read from their environment (`topology.discover`)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    address: str = "localhost"
    port: int = 0
    launcher: str = "none"
    topology: Topology | None = None
    served: bool = False
    attempt: int = 0  # how often the launcher has started the ranks again


def find_place(env: Mapping[str, str]) -> LaunchedRank:
    """The place that the environment describes; one rank of one if it names no launcher. Collective under mpirun.
    Raises PlaceError."""
    if "RANK" in env and "WORLD_SIZE" in env:
        return _by_torch_names(env)
    if any(name in env for name in MPI_NAMES):
        return _by_mpi(env)
    if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        return _by_slurm(env)
    if any(name in env for name in PMI_NAMES):
        return _by_mpi(env)
    return LaunchedRank()


def _by_torch_names(env: Mapping[str, str]) -> LaunchedRank:
    rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    local = _number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else rank
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_SIZE" in env else "RANK"
    if not rank < world:
        raise PlaceError(f"RANK = {rank} of WORLD_SIZE = {world}: ranks are counted from 0; unset both to run alone")
    if world == 1:
        return LaunchedRank(launcher=launcher)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise PlaceError(f"RANK and WORLD_SIZE are set, but not {' and '.join(missing)}: set them to rank 0's host")
    served = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = int(env.get("TORCHELASTIC_RESTART_COUNT", 0)) if served else 0
    port = _number(env, "MASTER_PORT")
    return LaunchedRank(rank, world, local, env["MASTER_ADDR"], port, launcher, served=served, attempt=attempt)


def _by_slurm(env: Mapping[str, str]) -> LaunchedRank:
    """A task of srun. The port follows from job and step: all tasks know it, and two jobs on a host seldom share it."""
    rank, world, local = (_number(env, f"SLURM_{name}") for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID"))
    job, step = _number(env, "SLURM_JOB_ID"), _number(env, "SLURM_STEP_ID")
    address = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "localhost"))
    # A step's number is 2^32 minus a little for the steps that SLURM makes itself.
    port = _number(env, "MASTER_PORT") if "MASTER_PORT" in env else PORTS[(job * 31 + step) % len(PORTS)]
    return LaunchedRank(rank, world, local, address, port, "srun")


def first_host(hosts: str) -> str:
    """The first of SLURM's compressed list: gpu[007-012,20],login is gpu007."""
    first = re.sub(r"\[(\w+)[^\]]*\]", r"\1", hosts)
    return first.split(",")[0]


def _by_mpi(env: Mapping[str, str]) -> LaunchedRank:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise PlaceError(
            f"started by mpirun, but mpi4py cannot be used ({error}): {install('mpi4py')} for this MPI, or use torchrun"
        ) from None
    world: MPI.Comm = MPI.COMM_WORLD
    if world.size == 1:
        if any(env.get(name, "1") != "1" for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")):
            raise PlaceError(
                "mpirun started several ranks, but mpi4py sees one: it is built for another MPI than this mpirun; "
                "use the mpirun of mpi4py's MPI, or build mpi4py with `pip install --no-binary mpi4py mpi4py`"
            )
        return LaunchedRank(launcher="mpirun")
    topology = by_mpi()
    alone = len(topology.nodes) == 1
    address = world.bcast("localhost" if alone else env.get("MASTER_ADDR") or host_address(env))
    return LaunchedRank(
        world.rank, world.size, topology.rail_of(world.rank), address, launcher="mpirun", topology=topology
    )


def host_address(env: Mapping[str, str]) -> str:
    """The address at which other hosts reach this one: of the interface that gloo or NCCL shall use, else that of the
    host's name, unless it is a loopback one, as Debian's /etc/hosts has it; then the one of the default route."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if address := _interface_address(env.get(name, "").split(",")[0].lstrip("=^")):
            return address
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    return _routed_address() if address.startswith("127.") else address


def _interface_address(interface: str) -> str:
    """IPv4; empty if there is no such interface, or not on Linux."""
    import fcntl
    import struct

    if not interface:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            packed = fcntl.ioctl(sock, 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        except OSError:
            return ""
    return socket.inet_ntoa(packed[20:24])


def _routed_address() -> str:
    """Nothing is sent: connecting a datagram socket only picks the route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # an address for documentation, RFC 5737
        except OSError:
            return socket.gethostname()
        return str(sock.getsockname()[0])


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "")
    if not text.isdecimal():
        raise PlaceError(f"{name} = {text!r} is not a number; the launcher sets it, so unset it to run alone")
    return int(text)
