"""What doctor finds on a host: each kind of fault, made, is named with its fix; what cannot be seen is said."""

from __future__ import annotations

import resource
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from dryvine.comm import local
from dryvine.comm.watch import Watch, watch_world
from dryvine.launch.health import between, gpus, host
from dryvine.launch.health.before_run import before_run, checkpoint_bytes
from dryvine.launch.health.between import Node, compare, tournament, visit
from dryvine.launch.health.finding import Finding, judged
from dryvine.trainer.config import Config
from tests.support.launching import TINY


def only(findings: object) -> Any:
    (finding,) = list(findings)  # type: ignore[call-overload]
    return finding


def bad(findings: object) -> list[str]:
    return [str(f) for f in findings if f.verdict == "bad"]  # type: ignore[attr-defined]


def test_a_finding_is_a_line_with_its_fix() -> None:
    assert str(judged(False, "open files", "10", "raise it")) == "BAD     open files: 10; raise it"
    assert str(judged(True, "open files", "10", "raise it")) == "ok      open files: 10"


def limited(monkeypatch: pytest.MonkeyPatch, **values: tuple[int, int]) -> None:
    names = {getattr(resource, f"RLIMIT_{name.upper()}"): value for name, value in values.items()}
    monkeypatch.setattr(resource, "getrlimit", lambda which: names[which])


def test_limits_that_runs_fail_at(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, nofile=(1024, 1 << 20), memlock=(8 << 20, 8 << 20))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=64 << 20))
    few, locked, shared = bad(host.limits(2048, locks_memory=True))
    assert "1024 of 4096 that 2048 ranks may need; raise it with `ulimit -n 4096`" in few
    assert "locked memory: 8 MiB" in locked
    assert "0.062 GiB; in a container --ipc=host" in shared


def test_limits_that_are_high_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    forever = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    limited(monkeypatch, nofile=forever, memlock=forever)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=64 << 30))
    assert {f.verdict for f in host.limits(2048, locks_memory=True)} == {"ok"}


def test_a_disk_without_room_and_one_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PROBE", 1 << 20)
    assert "room on the disk of" in bad(host.disk(tmp_path / "runs/a", 10**18, 2))[0]
    assert not bad(host.disk(tmp_path / "runs/a", 1000, 2))

    def refuse(folder: Path) -> float:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(host, "_written_per_second", refuse)
    assert "cannot be written: read-only file system; set run.out" in bad(host.disk(tmp_path))[0]


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert "set MASTER_PORT to a free one" in bad(host.ports("here", port))[0]
    assert only(host.ports("here", port)).verdict == "ok"


class NVMLError(Exception):
    pass


def nvml(**changed: Callable[..., object]) -> Any:
    """Two healthy GPUs with 18 links; `changed` are NVML's functions without their nvmlDevice."""
    module: Any = ModuleType("pynvml")
    answers: dict[str, Callable[..., object]] = {
        "GetHandleByIndex": lambda i: i,
        "GetCount": lambda: 2,
        "GetCurrentClocksEventReasons": lambda h: 0,
        "GetTemperature": lambda h, sensor: 40,
        "GetApplicationsClock": lambda h, clock: 1980,
        "GetMaxClockInfo": lambda h, clock: 1980,
        "GetMemoryInfo": lambda h: SimpleNamespace(total=80e9, used=0.5e9),
        "GetComputeRunningProcesses": lambda h: [SimpleNamespace(pid=4711)],
        "GetTotalEccErrors": lambda h, kind, counter: 0,
        "GetRemappedRows": lambda h: (0, 0, 0, 0),
        "GetCurrPcieLinkWidth": lambda h: 16,
        "GetMaxPcieLinkWidth": lambda h: 16,
        "GetNvLinkState": lambda h, link: int(link < 18),
    }
    names = {f"nvmlDevice{name}": answer for name, answer in {**answers, **changed}.items()}
    reasons = {"HwThermalSlowdown": 64, "HwPowerBrakeSlowdown": 128, "HwSlowdown": 8, "SwThermalSlowdown": 32}
    module.__dict__.update(
        names,
        NVMLError=NVMLError,
        NVML_NVLINK_MAX_LINKS=24,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1,
        NVML_VOLATILE_ECC=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        **{f"nvmlClocksEventReason{name}": bit for name, bit in reasons.items()},
    )
    return module


def second(value: object, otherwise: object) -> Callable[..., object]:
    """An answer of GPU 1 that differs from GPU 0's."""
    return lambda h, *words: value if h == 1 else otherwise


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"GetCurrentClocksEventReasons": second(64, 0)}, "GPU 1 clocks: HwThermalSlowdown; it is too hot"),
        ({"GetCurrentClocksEventReasons": second(128, 0)}, "HwPowerBrakeSlowdown; its power supply"),
        ({"GetTemperature": second(90, 40)}, "GPU 1 heat: 90 C"),
        ({"GetTotalEccErrors": second(3, 0)}, "GPU 1 ECC: 3 uncorrected errors"),
        ({"GetRemappedRows": second((0, 1, 1, 0), (0, 0, 0, 0))}, "remapping waits for a reset"),
        ({"GetRemappedRows": second((0, 1, 0, 1), (0, 0, 0, 0))}, "remapping failed; replace this GPU"),
        ({"GetCurrPcieLinkWidth": second(8, 16)}, "GPU 1 PCIe: 8 of 16 lanes"),
        ({"GetNvLinkState": lambda h, link: int(link < 18 - h)}, "NVLink: GPU 1 has 17 of 18; drain this node"),
        (
            {"GetMemoryInfo": second(SimpleNamespace(total=80e9, used=20e9), SimpleNamespace(total=80e9, used=0.0))},
            "GPU 1 memory: 20.0 GB held by process 4711; end it",
        ),
        ({"GetCount": lambda: 1}, "GPUs: 1, of 2 needed; a GPU is lost"),
    ],
)
def test_a_sick_gpu_is_named(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Callable[..., object]], says: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(**changed))
    (line,) = bad(gpus.gpus(2))
    assert says in line


def test_healthy_gpus_are_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    assert [f.what for f in gpus.gpus(2)] == ["GPUs", "GPU 0", "GPU 1", "NVLink"]
    assert {f.verdict for f in gpus.gpus(2)} == {"ok"}


def test_what_a_driver_does_not_tell_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*words: object) -> object:
        raise NVMLError("not supported")

    monkeypatch.setitem(
        sys.modules,
        "pynvml",
        nvml(
            GetTotalEccErrors=unsupported,
            GetCurrentClocksEventReasons=unsupported,
            GetCurrentClocksThrottleReasons=unsupported,
        ),
    )
    assert [str(f) for f in gpus.gpus(2) if f.verdict == "unknown"] == [
        "unknown GPU 0 clocks: its driver does not tell why clocks are low",
        "unknown GPU 0 ECC: not told, or off",
        "unknown GPU 1 clocks: its driver does not tell why clocks are low",
        "unknown GPU 1 ECC: not told, or off",
    ]


def test_no_driver_is_bad_only_where_gpus_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nvml()

    def fail() -> None:
        raise NVMLError("library not found")

    module.nvmlInit = fail
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert (only(gpus.gpus(8)).verdict, only(gpus.gpus(0)).verdict) == ("bad", "unknown")


def port(root: Path, device: str, state: str, rate: str = "400 Gb/sec (4X NDR)", downed: str = "0") -> None:
    folder = root / "class/infiniband" / device / "ports/1"
    (folder / "counters").mkdir(parents=True)
    (folder / "state").write_text(state + "\n")
    (folder / "rate").write_text(rate + "\n")
    (folder / "counters/link_downed").write_text(downed + "\n")


def test_infiniband_ports(tmp_path: Path) -> None:
    assert only(gpus.infiniband(tmp_path)).verdict == "unknown"
    port(tmp_path, "mlx5_0", "4: ACTIVE")
    port(tmp_path, "mlx5_1", "1: DOWN")
    port(tmp_path, "mlx5_2", "4: ACTIVE", rate="100 Gb/sec (4X EDR)")
    port(tmp_path, "mlx5_3", "4: ACTIVE", downed="7")
    fine, down, slow, flaps = gpus.infiniband(tmp_path)
    assert str(fine) == "ok      mlx5_0 port 1: active, 400 Gb/sec (4X NDR)"
    assert "mlx5_1 port 1: 1: DOWN; check cable" in str(down)
    assert "mlx5_2 port 1: 100 Gb/sec (4X EDR), others 400 Gb/sec (4X NDR)" in str(slow)
    assert (flaps.verdict, flaps.found) == ("note", "its link went down 7 times")


def test_xid_errors_in_the_kernels_log() -> None:
    log = "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus\nNVRM: Xid (PCI:0000:3b:00): 13, Graphics\n"
    assert "XID errors: 79 (GPU has fallen off the bus); reset the GPU" in bad(gpus.xids(lambda: log))[0]
    assert only(gpus.xids(lambda: "NVRM: Xid (PCI:0000:3b:00): 13, x")).found == "none of a fault; 1 of applications"

    def refuse() -> str:
        raise PermissionError("dmesg: not permitted")

    assert only(gpus.xids(refuse)).verdict == "unknown"


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_in_a_tournament_each_pair_meets_once(count: int) -> None:
    rounds = list(tournament(count))
    for pairs in rounds:
        players = [player for pair in pairs for player in pair]
        assert len(players) == len(set(players))
    met = sorted(pair for pairs in rounds for pair in pairs)
    assert met == [(a, b) for a in range(count) for b in range(a + 1, count)]


Tries = dict[tuple[int, int], tuple[float, ...]]


def nodes_with(slow: Tries, count: int = 4, ahead: float = 0.0) -> list[Node]:
    pairs = [pair for pairs in tournament(count) for pair in pairs]
    return [
        Node(
            f"n{rank}",
            (),
            {pair: slow.get(pair, (10.0,)) for pair in pairs if rank in pair},
            ahead if rank == 2 else 0.0,
        )
        for rank in range(count)
    ]


def test_a_node_with_a_bad_cable_and_a_bad_switch() -> None:
    cable: Tries = {(0, 3): (1.0, 0.5, 1.0, 1.0), (1, 3): (1.1,) * 4, (2, 3): (1.2,) * 4}
    (line,) = bad(compare(nodes_with(cable)))
    assert "slow: n0 and n3 1.00" in line
    assert line.endswith("check cable and port of n3")
    (line,) = bad(compare(nodes_with({(1, 2): (2.0,) * 4})))
    assert line.endswith("slow: n1 and n2 2.00; check the switch between them")
    assert not bad(compare(nodes_with({})))


def test_a_pair_that_was_slow_once_is_a_note() -> None:
    bandwidth, _ = compare(nodes_with({(1, 2): (2.0, 3.0, 9.0)}))
    assert str(bandwidth).startswith("note    bandwidth of 6 pairs of nodes: 9.00 to 10.00 GB/s each way")
    assert "slow once, and not when measured again: n1 and n2 2.00" in str(bandwidth)


def test_each_end_of_a_pair_is_asked() -> None:
    """Node 0 has sent and received at once; node 1 has waited."""
    nodes = nodes_with({}, count=3)
    nodes[1] = nodes[1]._replace(speeds={**nodes[1].speeds, (0, 1): (1.0, 1.0)})
    nodes[0] = nodes[0]._replace(speeds={**nodes[0].speeds, (0, 1): (10.0, 10.0)})
    assert "n0 and n1 1.00" in only(bad(compare(nodes)))


def test_a_clock_that_is_ahead() -> None:
    (line,) = bad(compare(nodes_with({}, ahead=3.25)))
    assert "clocks: n2 by +3.25 s; start chronyd there" in line


def visited(rank: int) -> list[Node]:
    watch = watch_world(60.0)
    nodes = visit(f"n{rank}", [Finding("ok", "x", str(rank))], torch.device("cpu"), watch)
    distributed.barrier()
    watch.close()
    return nodes


def test_three_nodes_measure_each_other() -> None:
    answers = local.run(visited, 3, deadline=120)
    assert answers[0] == answers[1] == answers[2]
    nodes = answers[0]
    assert [node.name for node in nodes] == ["n0", "n1", "n2"]
    assert set(nodes[1].speeds) == {(0, 1), (1, 2)}
    assert min(speed for node in nodes for tries in node.speeds.values() for speed in tries) > 0
    assert max(abs(node.ahead) for node in nodes) < 1.0
    assert nodes[2].findings == (Finding("ok", "x", "2"),)


def visited_slowly(rank: int) -> tuple[dict[tuple[int, int], int], list[str]]:
    """Times that each pair was measured: 0 and 2 are slow always, 1 and 3 only once."""
    often: dict[int, int] = {}

    def exchange(partner: int, device: torch.device, watch: Watch) -> float:
        often[partner] = often.get(partner, 0) + 1
        slow = {rank, partner} == {0, 2} or ({rank, partner} == {1, 3} and often[partner] == 1)
        return 1.0 if slow else 10.0

    watch = watch_world(60.0)
    between._exchange = exchange
    nodes = visit(f"n{rank}", [], torch.device("cpu"), watch)
    distributed.barrier()
    watch.close()
    return {pair: len(tries) for node in nodes for pair, tries in node.speeds.items()}, bad(compare(nodes))


def test_rounds_with_a_slow_pair_are_measured_again() -> None:
    """0 and 2, and who was measured beside them, as often as it takes to be sure; 1 and 3 share their round."""
    for tries, found in local.run(visited_slowly, 4, deadline=120):
        again = {pair for pairs in tournament(4) if (0, 2) in pairs for pair in pairs}
        assert tries == {pair: 4 if pair in again else 1 for pair in tries}
        assert "slow: n0 and n2 1.00; check the switch" in only(found)


def test_before_a_run_on_one_node(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = (f'data.source="{corpus}"', f'run.out="{tmp_path}"')
    assert before_run(Path(TINY), given) == 0
    said = capsys.readouterr().out
    assert "ok      config and data: 1 ranks" in said
    assert "`srun --ntasks=NODES --ntasks-per-node=1` asks all nodes of a job" in said, "srun needs both in a job"
    assert before_run(Path(TINY), (*given, 'data.source="/nowhere"')) == 1
    assert "BAD     start: /nowhere: no finished dataset here" in capsys.readouterr().out
    assert before_run(Path(TINY), (*given, 'run.init_from="/nowhere"')) == 1
    assert "BAD     start: run.init_from: /nowhere: no such folder" in capsys.readouterr().out


def test_the_room_that_checkpoints_need(tiny: Callable[..., Config]) -> None:
    full, half = checkpoint_bytes(tiny()), checkpoint_bytes(tiny('optim.moments="bf16"'))
    assert full * 8 == half * 12
