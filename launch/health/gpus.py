"""Faults of GPUs and InfiniBand ports, from NVML, sysfs and the kernel's log. Imports no torch.

A faulty GPU still trains: slowly if it is hot or has lost links, wrongly if its memory fails. These checks take a
second; a run would show it after hours. What a driver or container does not expose is reported as unknown.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeVar

from dryvine.launch.health.finding import Finding, judged

V = TypeVar("V")
HOT = 85  # degrees C at which Hopper is about to slow down
HELD = 0.02  # share of a GPU's memory that the driver itself uses

# Why a GPU's clocks are low, by NVML's names (before driver 535 "Throttle", not "Event").
SLOWDOWNS = {
    "HwThermalSlowdown": "it is too hot: check its cooling",
    "HwPowerBrakeSlowdown": "its power supply has asked for less: check the node's power",
    "HwSlowdown": "its hardware slows it down: check power and cooling",
    "SwThermalSlowdown": "its driver slows it down for heat: check its cooling",
}
# Xid numbers after which a GPU computes wrongly or not at all (NVIDIA's Xid catalogue); others are an application's.
XIDS = {48: "double-bit ECC error", 63: "row remapping", 64: "row remapping failed", 74: "NVLink error",
        79: "GPU has fallen off the bus", 92: "many single-bit ECC errors", 94: "contained ECC error",
        95: "uncontained ECC error", 119: "GSP does not answer", 120: "GSP error"}  # fmt: skip


class Query(NamedTuple):
    """NVML and a handle of one of its GPUs."""

    nvml: ModuleType
    handle: object

    def ask(self, name: str, *words: object) -> object | None:
        """The value of nvmlDevice`name`, or None if this GPU, driver or version does not have it."""
        try:
            answer: object = getattr(self.nvml, f"nvmlDevice{name}")(self.handle, *words)
        except (self.nvml.NVMLError, AttributeError, TypeError):
            return None
        return answer


def gpus(wanted: int) -> Iterator[Finding]:
    """Findings on this host's GPUs, of which a run needs `wanted` (0: none required)."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        yield Finding("unknown", "GPUs", "nvidia-ml-py is not installed", "pip install nvidia-ml-py")
        return
    except pynvml.NVMLError as error:
        fix = "load the driver, or give the container its GPUs"
        yield Finding("bad" if wanted else "unknown", "GPUs", f"no NVIDIA driver ({error})", fix if wanted else "")
        return
    try:
        count = pynvml.nvmlDeviceGetCount()
        yield judged(count >= wanted, "GPUs", f"{count}, of {wanted} needed", "a GPU is lost: drain this node")
        queries = [Query(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]
        for index, query in enumerate(queries):
            yield from _gpu(query, f"GPU {index}")
        yield from _links(queries)
    finally:
        pynvml.nvmlShutdown()


def _gpu(query: Query, name: str) -> Iterator[Finding]:
    bad = [finding for check in (_clocks, _memory, _ecc, _rows, _pcie) for finding in check(query, name)]
    yield from bad or [Finding("ok", name, "clocks, heat, memory, ECC, PCIe")]


def _clocks(query: Query, name: str) -> Iterator[Finding]:
    reasons = query.ask("GetCurrentClocksEventReasons")
    reasons = query.ask("GetCurrentClocksThrottleReasons") if reasons is None else reasons
    if not isinstance(reasons, int):
        yield Finding("unknown", f"{name} clocks", "its driver does not tell why clocks are low")
        return
    for reason, fix in SLOWDOWNS.items():
        bit = getattr(query.nvml, f"nvmlClocksEventReason{reason}", 0)
        if reasons & bit:
            yield Finding("bad", f"{name} clocks", reason, fix)
    degrees = query.ask("GetTemperature", 0)
    if isinstance(degrees, int) and degrees >= HOT:
        yield Finding("bad", f"{name} heat", f"{degrees} C", "check its cooling")
    limit, highest = query.ask("GetApplicationsClock", 1), query.ask("GetMaxClockInfo", 1)
    if isinstance(limit, int) and isinstance(highest, int) and limit < highest * 0.8:
        yield Finding("note", f"{name} clocks", f"limited to {limit} of {highest} MHz", "nvidia-smi -rac lifts it")


def _memory(query: Query, name: str) -> Iterator[Finding]:
    memory = query.ask("GetMemoryInfo")
    total, used = getattr(memory, "total", 0), getattr(memory, "used", 0)
    if total and used > HELD * total + 1e9:
        processes = query.ask("GetComputeRunningProcesses")
        held = [str(process.pid) for process in processes] if isinstance(processes, list) else []
        by = (
            f"process {', '.join(held)}" if held else "nobody seen from here (another container, or one that is ending)"
        )
        yield Finding("bad", f"{name} memory", f"{used / 1e9:.1f} GB held by {by}", "end it, or drain this node")


def _ecc(query: Query, name: str) -> Iterator[Finding]:
    errors = query.ask("GetTotalEccErrors", query.nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, query.nvml.NVML_VOLATILE_ECC)
    if errors is None:
        yield Finding("unknown", f"{name} ECC", "not told, or off")
    elif errors:
        yield Finding("bad", f"{name} ECC", f"{errors} uncorrected errors since the driver started", "reset this GPU")


def _rows(query: Query, name: str) -> Iterator[Finding]:
    rows = query.ask("GetRemappedRows")
    if isinstance(rows, tuple | list):
        _, _, pending, failed = rows[:4]
        if failed:
            yield Finding("bad", f"{name} memory rows", "remapping failed", "replace this GPU")
        elif pending:
            yield Finding("bad", f"{name} memory rows", "remapping waits for a reset", "reset this GPU")


def _pcie(query: Query, name: str) -> Iterator[Finding]:
    now, most = query.ask("GetCurrPcieLinkWidth"), query.ask("GetMaxPcieLinkWidth")
    if isinstance(now, int) and isinstance(most, int) and now < most:
        yield Finding("bad", f"{name} PCIe", f"{now} of {most} lanes", "reseat it, or drain this node")


def _links(queries: list[Query]) -> Iterator[Finding]:
    """NVLink: all GPUs of a node have equally many links; one with fewer has lost some."""
    active = [_active_links(query) for query in queries]
    if not active or not max(active):
        return
    lost = [f"GPU {i} has {n} of {max(active)}" for i, n in enumerate(active) if n < max(active)]
    yield judged(not lost, "NVLink", ", ".join(lost) or f"{max(active)} links on every GPU", "drain this node")


def _active_links(query: Query) -> int:
    return sum(query.ask("GetNvLinkState", link) == 1 for link in range(query.nvml.NVML_NVLINK_MAX_LINKS))


def infiniband(sysfs: Path = Path("/sys")) -> Iterator[Finding]:
    """Ports that are down, slower than their siblings, or lose their link."""
    ports = sorted((sysfs / "class/infiniband").glob("*/ports/*"))
    if not ports:
        yield Finding("unknown", "InfiniBand", "no devices in /sys/class/infiniband")
        return
    rates = {port: _read(port / "rate") for port in ports}
    best = max(rates.values(), key=_gigabits)
    for port in ports:
        name, state = f"{port.parts[-3]} port {port.name}", _read(port / "state")
        downed = _read(port / "counters/link_downed")
        if "ACTIVE" not in state:
            yield Finding("bad", name, state or "no state", "check cable and subnet manager, or leave it out: --ib-hca")
        elif _gigabits(rates[port]) < _gigabits(best):
            yield Finding("bad", name, f"{rates[port]}, others {best}", "check its cable")
        elif downed.isdecimal() and int(downed) > 0:
            yield Finding("note", name, f"its link went down {downed} times", "if the number grows, change the cable")
        else:
            yield Finding("ok", name, f"active, {rates[port]}")


def _gigabits(rate: str) -> float:
    found = re.match(r"[\d.]+", rate)
    return float(found[0]) if found else 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def kernel_log() -> str:
    """Raises OSError where it may not be read."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=10, check=True)
    except subprocess.SubprocessError as error:
        raise PermissionError(f"dmesg: {error}") from None
    return done.stdout


def xids(log: Callable[[], str] = kernel_log) -> Iterator[Finding]:
    """GPU faults in the kernel's log since boot."""
    try:
        lines = log()
    except OSError as error:
        yield Finding("unknown", "XID errors", f"the kernel's log cannot be read here ({error})")
        return
    seen = {int(number) for number in re.findall(r"NVRM: Xid \([^)]*\): (\d+)", lines)}
    grave = [f"{number} ({XIDS[number]})" for number in sorted(seen & XIDS.keys())]
    others = f"none of a fault; {len(seen)} of applications" if seen else "none"
    yield judged(not grave, "XID errors", ", ".join(grave) or others, "reset the GPU, or drain this node")
