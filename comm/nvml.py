"""The links of a node's GPUs and NICs, from NVML and sysfs, which refine a topology. Imports no torch.

A GPU is known by its PCI bus id, never by its index: CUDA_VISIBLE_DEVICES and NVML number differently. Its NIC is the
one that shares the longest PCI path with it, which is what NCCL's rail optimisation needs to hold. Without a driver
the result is empty and states why; nothing here fails a run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from dryvine.comm.topology import Link, Topology, TopologyConfig, speed

V = TypeVar("V")
# Of a link, in MB/s: the first that the driver answers. Virtual machines know the second one alone.
SPEED_FIELDS = ("NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON", "NVML_FI_DEV_NVLINK_GET_SPEED")


@dataclass(frozen=True)
class Nic:
    """An InfiniBand or RoCE device and its port's rate in GB/s."""

    name: str
    kind: str
    gigabytes: float
    path: str


@dataclass(frozen=True)
class Gpu:
    """`nvlink_gigabytes` is the sum over active links, each way; `clique` names an NVLink domain that spans nodes."""

    bus_id: str
    name: str
    nvlinks: int
    nvlink_gigabytes: float
    clique: str
    nic: Nic | None


@dataclass(frozen=True)
class Hardware:
    """One node's devices; `trouble` states why there are no GPUs, `nvlinked` whether NVLink joins each pair of them."""

    gpus: tuple[Gpu, ...] = ()
    nics: tuple[Nic, ...] = ()
    trouble: str = ""
    nvlinked: bool = True


def sysfs_bus_id(bus_id: str) -> str:
    """NVML's 00000000:1B:00.0 as sysfs and CUDA write it: 0000:1b:00.0."""
    return bus_id.lower()[-12:]


def probe(sysfs: Path = Path("/sys")) -> Hardware:
    """Ask NVML and sysfs about this node."""
    devices = nics(sysfs)
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return Hardware(nics=devices, trouble="nvidia-ml-py is not installed: GPU links unknown")
    except pynvml.NVMLError as error:
        return Hardware(nics=devices, trouble=f"no NVIDIA driver ({error}): GPU links unknown")
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gpus = tuple(_gpu(pynvml, handle, devices, sysfs) for handle in handles)
        return Hardware(gpus, devices, nvlinked=_nvlinked(pynvml, handles))
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: ModuleType, handle: object, devices: Sequence[Nic], sysfs: Path) -> Gpu:
    bus_id = sysfs_bus_id(_text(nvml.nvmlDeviceGetPciInfo(handle).busId))
    links = _nvlinks(nvml, handle)
    gigabytes = links * _megabytes_of_a_link(nvml, handle) / 1000
    name = _text(nvml.nvmlDeviceGetName(handle))
    return Gpu(bus_id, name, links, gigabytes, _clique(nvml, handle), nearest(bus_id, devices, sysfs))


def _megabytes_of_a_link(nvml: ModuleType, handle: object) -> int:
    """MB/s each way of one link; 0 if the driver has none of the fields."""

    def field(name: str) -> int:
        answer = nvml.nvmlDeviceGetFieldValues(handle, [getattr(nvml, name)])[0]
        return 0 if answer.nvmlReturn else int(answer.value.uiVal)  # a field fails by itself, without an exception

    return next(filter(None, (_asked(nvml, lambda name=name: field(name), 0) for name in SPEED_FIELDS)), 0)  # type: ignore[misc]


def _nvlinked(nvml: ModuleType, handles: Sequence[object]) -> bool:
    """Whether each pair can use NVLink, by the driver's peer-to-peer status: the device at a link's far end, which
    would tell too, is hidden from a virtual machine."""

    def joined(one: object, other: object) -> bool:
        status: int = nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        return status == nvml.NVML_P2P_STATUS_OK

    pairs = combinations(handles, 2)
    return all(_asked(nvml, lambda pair=pair: joined(*pair), True) for pair in pairs)  # type: ignore[misc]


def _nvlinks(nvml: ModuleType, handle: object) -> int:
    """How many of the GPU's links are active."""
    states = (
        _asked(nvml, lambda link=link: nvml.nvmlDeviceGetNvLinkState(handle, link), 0)  # type: ignore[misc]
        for link in range(nvml.NVML_NVLINK_MAX_LINKS)
    )
    return sum(1 for state in states if state)


def _clique(nvml: ModuleType, handle: object) -> str:
    """Cluster UUID and clique of a multi-node NVLink fabric (NVL72); empty where there is none."""
    info = nvml.c_nvmlGpuFabricInfoV_t()
    _asked(nvml, lambda: nvml.nvmlDeviceGetGpuFabricInfoV(handle, nvml.byref(info)), None)  # fills `info` if it can
    uuid = bytes(info.clusterUuid)
    return f"{uuid.hex()}/{info.cliqueId}" if any(uuid) else ""


def _asked(nvml: ModuleType, question: Callable[[], V], otherwise: V) -> V:
    """The driver's value, or `otherwise` if this GPU or driver has none."""
    try:
        return question()
    except (nvml.NVMLError, AttributeError):
        return otherwise


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def nics(sysfs: Path) -> tuple[Nic, ...]:
    """RDMA devices with an active first port, by name."""
    devices = []
    for device in sorted((sysfs / "class/infiniband").glob("*")):
        port = device / "ports/1"
        try:
            rate, layer = (port / "rate").read_text(), (port / "link_layer").read_text().strip()
            active = "ACTIVE" in (port / "state").read_text()
        except OSError:
            continue
        if active:
            kind = "InfiniBand" if layer == "InfiniBand" else "RoCE"
            gigabytes = float(rate.split()[0]) / 8  # from Gbit/s
            devices.append(Nic(device.name, kind, gigabytes, os.path.realpath(device / "device")))
    return tuple(devices)


def nearest(bus_id: str, devices: Sequence[Nic], sysfs: Path) -> Nic | None:
    """The NIC with the longest PCI path in common with the GPU; the first by name where several are as near."""
    gpu = os.path.realpath(sysfs / "bus/pci/devices" / bus_id)

    def shared(nic: Nic) -> int:
        return len(os.path.commonpath([gpu, nic.path]))

    return max(devices, key=shared, default=None)


def refined(topology: Topology, hardware: Hardware, config: TopologyConfig | None = None) -> Topology:
    """Link kinds and speeds as the hardware reports them; a link that `config` sets, or that the hardware does not
    have, stays as it is."""
    given = config or TopologyConfig()
    fastest = max((gpu.nvlink_gigabytes for gpu in hardware.gpus), default=0.0) if hardware.nvlinked else 0.0
    if hardware.gpus and not (given.intra or given.intra_gigabytes):
        topology = replace(topology, intra=Link("NVLink", fastest) if fastest else Link("PCIe", speed("PCIe")))
    if hardware.nics and not (given.inter or given.inter_gigabytes):
        nic = max(hardware.nics, key=lambda nic: nic.gigabytes)
        topology = replace(topology, inter=Link(nic.kind, nic.gigabytes))
    return topology


def merged(topology: Topology, cliques: Sequence[str]) -> Topology:
    """Nodes whose ranks are all in one NVLink fabric are one node for dispatch. `cliques` by rank; "" is none."""
    by_clique: dict[str, list[int]] = {}
    for number, node in enumerate(topology.nodes):
        names = {cliques[rank] for rank in node}
        key = names.pop() if len(names) == 1 and "" not in names else f"node {number}"
        by_clique.setdefault(key, []).extend(node)
    if len(by_clique) == len(topology.nodes):
        return topology
    nodes = tuple(tuple(sorted(ranks)) for ranks in by_clique.values())
    return replace(topology, nodes=nodes, source=f"{topology.source}, merged by NVLink fabric")
