"""How a process ends: by itself with hooks and no destructors, or by a timer that needs no interpreter."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import timedelta

import torch

from dryvine.comm.world import ENVIRONMENT, set_environment, timeout

BEGIN = "import ctypes, time\nfrom dryvine.comm.ending import Ending\nending = Ending()\n"


def run(script: str) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script], capture_output=True, text=True, timeout=60, check=False
    )
    return done, time.monotonic() - began


def test_hooks_run_and_nothing_else_does() -> None:
    done, _ = run(
        "ending.before(lambda: print('hook'))\n"
        "try:\n    print('last', end=' ')\n    ending.now(86)\n"
        "finally:\n    print('destructors')\n"
    )
    assert (done.returncode, done.stdout) == (86, "last hook\n")


def test_a_hook_that_hangs_does_not_keep_the_process() -> None:
    done, seconds = run("ending.before(lambda: time.sleep(50))\nending.now(86)\n")
    assert done.returncode == 1
    assert seconds < 40


def test_the_timer_ends_a_process_whose_interpreter_is_held() -> None:
    """PyDLL keeps the interpreter's lock through the call, as a stuck extension does."""
    done, seconds = run("ending.within(0.5)\nctypes.PyDLL(None).sleep(50)\n")
    assert done.returncode == 1
    assert 'File "<string>"' in done.stderr
    assert seconds < 40


def test_a_timer_can_be_put_off() -> None:
    done, _ = run("ending.within(0.5)\nending.within(30)\nending.postpone()\ntime.sleep(1)\nprint('alive')\n")
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_torch_comes_after_the_watch_and_the_user_before_both() -> None:
    assert timeout(600, torch.device("cuda")) == timedelta(seconds=660)
    assert timeout(600, torch.device("cpu")) == timedelta(seconds=600)
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    set_environment(environment)
    assert environment == ENVIRONMENT | {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
