"""Topology from every source, its refusals, what NVML adds, and how doctor draws it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dryvine.comm.nvml import Gpu, Hardware, merged, probe, refined
from dryvine.comm.place import LaunchedRank
from dryvine.comm.topology import GroupLimit, Topology, TopologyConfig, by_sizes, discover, mismatch, spans
from dryvine.launch.doctor import picture
from dryvine.trainer.__main__ import _topology as topology_of_run
from dryvine.trainer.config import Config
from tests.support.commands import invoke

NONE = TopologyConfig()


@pytest.mark.parametrize(
    ("world", "env", "nodes", "found"),
    [
        (4, {}, ((0, 1, 2, 3),), "default"),
        (4, {"LOCAL_WORLD_SIZE": "2"}, ((0, 1), (2, 3)), "torchrun"),
        (5, {"SLURM_TASKS_PER_NODE": "2(x2),1"}, ((0, 1), (2, 3), (4,)), "SLURM"),
        (5, {"SLURM_TASKS_PER_NODE": "2(x2),1", "SLURM_DISTRIBUTION": "cyclic"}, ((0, 3), (1, 4), (2,)), "cyclic"),
        (4, {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, ((0, 1), (2, 3)), "MPI"),
        (4, {"MPI_LOCALNRANKS": "4"}, ((0, 1, 2, 3),), "MPI"),
    ],
)
def test_found_by_environment(world: int, env: dict[str, str], nodes: tuple[tuple[int, ...], ...], found: str) -> None:
    topology = discover(world, NONE, env)
    assert topology.nodes == nodes
    assert found in topology.source


def test_config_comes_first() -> None:
    config = TopologyConfig(nodes=(3, 1), inter="InfiniBand", intra_gigabytes=7)
    topology = discover(4, config, {"LOCAL_WORLD_SIZE": "2"})
    assert topology.nodes == ((0, 1, 2), (3,))
    assert (topology.inter.gigabytes, topology.intra.gigabytes) == (50.0, 7)


def test_refusals_name_the_fix() -> None:
    with pytest.raises(ValueError, match=r"5 ranks do not fill nodes of 2; .* set comm\.topology\.nodes"):
        discover(5, NONE, {"LOCAL_WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match=r"3 ranks on 2 nodes, but the run has 4; set comm\.topology\.nodes"):
        discover(4, TopologyConfig(nodes=(2, 1)), {})


def test_rails() -> None:
    even = by_sizes([2, 2, 2])
    assert even.rails() == ((0, 2, 4), (1, 3, 5))
    assert even.clients(3) == (1, 5)
    assert even.link(0, 0) == "self"
    assert even.link(0, 1) == "intra"
    assert even.link(0, 2) == "inter"
    uneven = by_sizes([3, 2])
    assert uneven.proxy(2, 1) == 3  # rail 2 is not there: rail 0 takes it
    assert uneven.rails() == ((0, 2, 3), (1, 4))
    assert uneven.clients(3) == (0, 2)


def test_part_of_a_world() -> None:
    part = by_sizes([2, 2, 2]).of([1, 2, 3])
    assert part.nodes == ((0,), (1, 2))


def test_groups_that_do_not_fit_nodes_are_said_with_their_cost() -> None:
    limit = GroupLimit(8, 4)
    assert mismatch(by_sizes([8] * 8), 256, limit, 14336) is None
    assert mismatch(by_sizes([4, 4]), 256, limit, 14336) is None
    said = mismatch(by_sizes([2] * 6), 288, limit, 1000)
    assert said is not None
    assert "a token may reach 6 nodes instead of 4, up to 2000 bytes more a token and layer" in said


def test_doctor_draws_even_and_uneven_nodes() -> None:
    assert picture(by_sizes([2, 2])).splitlines() == [
        "node 0    -r0--r1-  loopback",
        "           |   |    ethernet",
        "node 1    -r2--r3-  loopback",
    ]
    assert "rail 2 of other nodes end at 3" in picture(by_sizes([3, 2]))
    assert spans([0, 1, 2, 5]) == "0-2 5"
    _, said = invoke("doctor", "--nodes=8,8", "--experts=256", "--groups=8:4")
    assert "16 ranks on 2 nodes" in said
    assert "dispatcher: hierarchical (2 nodes: a token crosses ethernet 1.00 times" in said
    assert "routing groups fit nodes" in said
    assert "7 experts do not divide over 5 ranks" in invoke("doctor", "--nodes=3,2", "--experts=7")[1]


def fake_sysfs(root: Path) -> Path:
    """Two GPUs and two NICs, each pair under its own switch."""
    for number, (bus, nic) in enumerate((("0000:1b:00.0", "mlx5_0"), ("0000:9b:00.0", "mlx5_1"))):
        switch = root / f"devices/pci{number}/switch"
        (switch / bus).mkdir(parents=True)
        (switch / f"nic{number}").mkdir()
        (root / "bus/pci/devices").mkdir(parents=True, exist_ok=True)
        (root / "bus/pci/devices" / bus).symlink_to(switch / bus)
        port = root / "class/infiniband" / nic / "ports/1"
        port.mkdir(parents=True)
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
        (port / "link_layer").write_text("InfiniBand\n")
        (port / "state").write_text("4: ACTIVE\n")
        (root / "class/infiniband" / nic / "device").symlink_to(switch / f"nic{number}")
    return root


class NVMLError(Exception):
    pass


def fake_nvml(clique: bytes, virtual: bool = False, joined: int = 0) -> Any:
    """NVML of two H100s with 18 links of 25 GB/s; what it answers has the shape of nvidia-ml-py's. In a virtual machine
    the common field of the speed is not supported, and the other one says 26562 MB/s."""
    module: Any = ModuleType("pynvml")
    buses = ["00000000:1B:00.0", "00000000:9B:00.0"]

    def state(handle: int, link: int) -> int:
        if link >= 18:
            raise NVMLError("not supported")
        return 1

    def fabric(handle: int, info: Any) -> None:
        info.clusterUuid, info.cliqueId = clique, 7

    def field(handle: int, fields: list[int]) -> list[Any]:
        megabytes = {1: 0 if virtual else 25000, 2: 26562}[fields[0]]
        return [SimpleNamespace(nvmlReturn=0 if megabytes else 3, value=SimpleNamespace(uiVal=megabytes or 777))]

    module.__dict__.update(
        NVMLError=NVMLError,
        NVML_NVLINK_MAX_LINKS=36,
        NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON=1,
        NVML_FI_DEV_NVLINK_GET_SPEED=2,
        NVML_P2P_CAPS_INDEX_NVLINK=2,
        NVML_P2P_STATUS_OK=0,
        nvmlDeviceGetP2PStatus=lambda one, other, index: joined,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetName=lambda h: "NVIDIA H100",
        nvmlDeviceGetPciInfo=lambda h: SimpleNamespace(busId=buses[h]),
        nvmlDeviceGetFieldValues=field,
        nvmlDeviceGetNvLinkState=state,
        c_nvmlGpuFabricInfoV_t=lambda: SimpleNamespace(clusterUuid=bytes(16), cliqueId=0),
        byref=lambda info: info,
        nvmlDeviceGetGpuFabricInfoV=fabric,
    )
    return module


def test_nvml_refines_links_and_finds_each_gpu_its_nic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(bytes(16)))
    hardware = probe(fake_sysfs(tmp_path))
    first, second = hardware.gpus
    assert (first.nvlinks, first.nvlink_gigabytes, first.clique) == (18, 450.0, "")
    assert first.nic is not None
    assert second.nic is not None
    assert (first.nic.name, second.nic.name) == ("mlx5_0", "mlx5_1")
    assert [gpu.bus_id for gpu in hardware.gpus] == ["0000:1b:00.0", "0000:9b:00.0"]
    topology = refined(by_sizes([2, 2]), hardware)
    assert topology.intra == ("NVLink", 450.0)
    assert topology.inter == ("InfiniBand", 50.0)


def test_a_virtual_machine_has_nvlink_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(bytes(16), virtual=True))
    hardware = probe(tmp_path)
    assert [gpu.nvlink_gigabytes for gpu in hardware.gpus] == pytest.approx([18 * 26.562] * 2)
    assert refined(by_sizes([2]), hardware).intra.kind == "NVLink"


def test_gpus_whose_links_lead_elsewhere_talk_over_pcie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(bytes(16), joined=5))
    assert refined(by_sizes([2]), probe(tmp_path)).intra == ("PCIe", 25.0)


def test_what_the_config_says_of_a_link_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(bytes(16)))
    hardware = probe(fake_sysfs(tmp_path))
    for given in (TopologyConfig(nodes=(2, 2), intra="PCIe"), TopologyConfig(nodes=(2, 2), intra_gigabytes=25.0)):
        topology = refined(discover(4, given, {}), hardware, given)
        assert topology.intra.gigabytes == 25.0
        assert topology.inter == ("InfiniBand", 50.0)
    given = TopologyConfig(nodes=(2, 2), inter="RoCE", inter_gigabytes=12.0)
    topology = refined(discover(4, given, {}), hardware, given)
    assert topology.intra == ("NVLink", 450.0)
    assert topology.inter == ("RoCE", 12.0)


def test_training_on_gpus_asks_nvml_for_the_links_and_on_cpus_does_not(
    tmp_path: Path, tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(bytes(16)))
    monkeypatch.setattr("dryvine.trainer.__main__.probe", lambda: probe(fake_sysfs(tmp_path)))
    assert topology_of_run(tiny(), LaunchedRank(), torch.device("cuda")).intra == ("NVLink", 450.0)
    assert topology_of_run(tiny(), LaunchedRank(), torch.device("cpu")).intra == ("loopback", 4.0)


def test_a_gpu_without_nvlink_is_on_pcie() -> None:
    gpu = Gpu("0000:1b:00.0", "NVIDIA L4", 0, 0.0, "", None)
    assert refined(by_sizes([2]), Hardware((gpu,))).intra == ("PCIe", 25.0)


def test_a_fabric_over_nodes_makes_them_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(b"\x01" * 16))
    clique = probe(tmp_path).gpus[0].clique
    assert clique == "01" * 16 + "/7"
    assert merged(by_sizes([2, 2, 2]), [clique] * 4 + ["", ""]).nodes == ((0, 1, 2, 3), (4, 5))
    assert merged(by_sizes([2, 2]), [""] * 4) == by_sizes([2, 2])


def test_without_a_driver_the_topology_stays() -> None:
    hardware = probe(Path("/nowhere"))
    assert not hardware.gpus
    assert "GPU links unknown" in hardware.trouble
    assert refined(by_sizes([2]), Hardware()) == Topology(((0, 1),))
