"""Real launchers: each gives the same ranks for the same config, so the same losses to the last bit. Ranks that were
not started alike end together, in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.exit_codes import ExitCode
from tests.support import netns_bed
from tests.support.launching import BIN, MODULE, environment, losses, together, words

pytestmark = pytest.mark.long

NAMESPACES = pytest.mark.skipif(bool(netns_bed.missing()), reason=netns_bed.missing() or "-")
MPIRUN = (str(BIN / "mpirun"),)
RANK = (sys.executable, *MODULE)
PORT = "29871"


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """What torchrun's ranks measure, on one node."""
    out = tmp_path_factory.mktemp("torchrun")
    command = (str(BIN / "torchrun"), "--nproc-per-node", "2", *MODULE, *words(corpus, out))
    ((code, printed),) = together([command], environment())
    assert code == 0, printed
    return losses(out / "tiny")


def test_mpirun(corpus: Path, tmp_path: Path, expected: list[tuple[float, float]]) -> None:
    ((code, printed),) = together([(*MPIRUN, "-n", "2", *RANK, *words(corpus, tmp_path))], environment())
    assert code == 0, printed
    assert losses(tmp_path / "tiny") == expected


def test_mpirun_with_one_rank_started_otherwise(corpus: Path, tmp_path: Path) -> None:
    usual = words(corpus, tmp_path)
    command = (*MPIRUN, "-n", "1", *RANK, *usual, ":", "-n", "1", *RANK, *usual, "optim.lr=0.5")
    ((code, printed),) = together([command], environment())
    assert code == 2, printed
    assert printed.count("dryvine: ") == 1
    assert "(rank 1): optim.lr is 0.5, not 0.001" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "tiny").exists()


def test_mpirun_of_a_config_that_all_refuse_prints_one_line(corpus: Path, tmp_path: Path) -> None:
    ((code, printed),) = together([(*MPIRUN, "-n", "2", *RANK, *words(corpus, tmp_path, "optim.lrr=1"))], environment())
    assert code == 2
    assert printed.strip().endswith("optim.lrr: unknown key; did you mean lr?")
    assert printed.count("\n") == 1


def test_deepspeeds_launcher(corpus: Path, tmp_path: Path, expected: list[tuple[float, float]]) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install -e .[deepspeed]")
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    launcher = (str(BIN / "deepspeed"), "-H", str(hosts), "--no_ssh_check", "--master_addr", "127.0.0.1")
    ((code, printed),) = together([(*launcher, "--module", "dryvine.trainer", *words(corpus, tmp_path))], environment())
    assert code == 0, printed
    assert losses(tmp_path / "tiny") == expected


def on_two_nodes(command: Callable[[int], tuple[str, ...]]) -> None:
    """Run `command(i)` in the namespace of node i; both must end well."""
    with netns_bed.nodes(2) as names:
        commands = [("ip", "netns", "exec", name, *command(i)) for i, name in enumerate(names)]
        ended = together(commands, environment(GLOO_SOCKET_IFNAME="eth0"))
    assert [code for code, _ in ended] == [0, 0], ended


@NAMESPACES
def test_torchrun_on_two_nodes(corpus: Path, tmp_path: Path, expected: list[tuple[float, float]]) -> None:
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"10.77.0.1:{PORT}", "--rdzv-id", "test")
    launcher = (str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", *meeting)
    # The name of this machine has another address than those of its namespaces.
    on_two_nodes(
        lambda i: (
            *(*launcher, "--rdzv-conf", f"is_host={1 - i}", "--local-addr", f"10.77.0.{i + 1}"),
            *(*MODULE, *words(corpus, tmp_path)),
        )
    )
    assert losses(tmp_path / "tiny") == expected


@NAMESPACES
def test_deepspeeds_hostfile_of_two_nodes(corpus: Path, tmp_path: Path, expected: list[tuple[float, float]]) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install -e .[deepspeed]")
    hosts = tmp_path / "hosts"
    hosts.write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    launcher = (str(BIN / "deepspeed"), "-H", str(hosts), "--no_ssh", "--master_addr", "10.77.0.1")
    run = ("--module", "dryvine.trainer", *words(corpus, tmp_path))
    on_two_nodes(lambda i: (*launcher, "--node_rank", str(i), *run))
    assert losses(tmp_path / "tiny") == expected


@NAMESPACES
def test_mpirun_on_two_nodes_where_one_has_other_data(corpus: Path, tmp_path: Path) -> None:
    """hydra starts its daemon on each node through a script in place of ssh; the nodes' data differ."""
    with netns_bed.nodes(2) as names:
        enter = tmp_path / "enter"
        choose = "".join(f"10.77.0.{i + 1}) node={name};; " for i, name in enumerate(names))
        # The words: -x HOST COMMAND...
        enter.write_text(
            f'#!/bin/sh\n[ "$1" = -x ] && shift\ncase "$1" in {choose} esac\nshift\n'
            'exec ip netns exec "$node" sh -c "$*"\n'
        )
        enter.chmod(0o755)
        hosts = ("-hosts", "10.77.0.1,10.77.0.2", "-ppn", "1", "-launcher", "ssh", "-launcher-exec", str(enter))
        other = words(corpus, tmp_path, "run.seed=3")
        command = (
            *("ip", "netns", "exec", names[0], *MPIRUN, *hosts, "-iface", "eth0"),
            *("-n", "1", *RANK, *words(corpus, tmp_path), ":", "-n", "1", *RANK, *other),
        )
        ((code, printed),) = together([command], environment(GLOO_SOCKET_IFNAME="eth0"))
    assert code == 2, printed
    assert "(rank 1): run.seed is 3, not 0" in printed


def children(pid: int) -> list[int]:
    """Processes that it started and that live, by /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


def test_torchruns_restarts_go_on_from_the_newest_checkpoint(corpus: Path, tmp_path: Path) -> None:
    """A rank is killed after a save; torchrun starts all again, and the run ends as one that was left alone."""
    more = ("run.steps=8", "run.checkpoint_every=2", "run.eval_every=100")
    agent = (str(BIN / "torchrun"), "--nproc-per-node", "2", "--max-restarts", "3", *MODULE)
    ((code, printed),) = together([(*agent, *words(corpus, tmp_path / "calm", *more))], environment())
    assert code == 0, printed
    folder = tmp_path / "killed" / "tiny"
    run = subprocess.Popen((*agent, *words(corpus, tmp_path / "killed", *more)), env=environment())
    try:
        until = time.monotonic() + 120
        while run_folder.newest(folder) is None and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(children(run.pid)[-1], signal.SIGKILL)
        assert run.wait(200) == 0
    finally:
        run.kill()
    starts = [json.loads(line)["after_step"] for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert starts[0] == 0 < starts[1]
    assert losses(folder) == losses(tmp_path / "calm" / "tiny")


def test_a_run_that_diverges_says_so_with_its_code_and_is_not_started_again(corpus: Path, tmp_path: Path) -> None:
    command = (str(BIN / "dryvine"), "train", *words(corpus, tmp_path, "run.steps=9", "optim.lr=1e30"))
    ((code, printed),) = together([(*command, "--max-restarts", "5")], environment())
    assert code == ExitCode.DIVERGED, printed
    assert "restart 1" not in printed
    assert "not finite" in printed
    assert "Traceback" not in printed
