"""What a user without an optional library is told, wherever a config or a command needs one: what installs it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from dryvine.comm.dispatch.choose import check_library
from dryvine.comm.extras import EXTRAS, LibraryMissing, lacking
from dryvine.parallel.schedule.rules import ScheduleError
from dryvine.parallel.schedule.search import exact
from dryvine.trainer.cpu_adam import load_cpu_adam
from dryvine.trainer.data import hub
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.quality import copies
from dryvine.trainer.evaluation import harness
from dryvine.trainer.evaluation.record import EvalError
from dryvine.trainer.fp8.engines import transformer_engine
from dryvine.trainer.hand_off.commands import need_gguf
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.rl.tasks.names import questions
from dryvine.trainer.rl.tasks.question import TaskError
from dryvine.trainer.rl.verifiers.pool import Pool, VerifierError
from tests.support.launching import TINY, environment

REPOSITORY = Path(__file__).parents[2]
GYM = {"name": "reasoning_gym", "dataset": "chain_sum"}


def absent(name: str) -> str:
    raise PackageNotFoundError(name)


def test_every_extra_is_of_the_package_and_has_a_library() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS.values()) | {"test"} == set(project["optional-dependencies"])


@pytest.mark.parametrize(
    ("library", "use", "error", "extra"),
    [
        ("mpi4py", lambda: check_library("mpi"), LibraryMissing, "mpi"),
        ("ortools", exact._ortools, ScheduleError, "search"),
        ("huggingface_hub", lambda: hub.fetch("hf://datasets/a/b/*.txt"), DataError, "hub"),
        ("datasketch", lambda: copies._NearIndex({}, 0.8), DataError, "quality"),
        ("gguf", need_gguf, HandOffError, "gguf"),
        ("reasoning_gym", lambda: questions(GYM, "train"), TaskError, "rl"),
    ],
)
def test_a_library_that_is_not_there_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, library: str, use: Callable[[], object], error: type[Exception], extra: str
) -> None:
    # Another test may have imported its submodules, which are then found without it.
    for module in {library, *(name for name in sys.modules if name.startswith(f"{library}."))}:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "dryvine.comm.dispatch.mpi", raising=False)
    with pytest.raises(error) as said:
        use()
    assert f'pip install "dryvine[{extra}]"' in str(said.value)


def test_libraries_that_are_found_by_their_metadata_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "version", absent)
    with pytest.raises(EvalError, match=r'pip install "dryvine\[harness\]"'):
        harness.need_harness()
    monkeypatch.setattr(transformer_engine, "no_hopper", lambda _: None)
    monkeypatch.setattr(transformer_engine, "version", absent)
    assert 'pip install "dryvine[te]"' in str(transformer_engine.TransformerEngine.missing(torch.device("cuda")))
    monkeypatch.setattr("importlib.metadata.version", absent)
    assert 'pip install "dryvine[deepspeed]"' in str(load_cpu_adam())


@pytest.mark.parametrize(("verifier", "library"), [("math", "math_verify"), ("reasoning_gym", "reasoning_gym")])
def test_a_verifier_without_its_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verifier: str, library: str
) -> None:
    without(monkeypatch, tmp_path, library)
    with pytest.raises(VerifierError, match=rf'verifier {verifier}: .*{library}.*: pip install "dryvine\[rl\]"'):
        Pool([verifier], workers=1)


def test_a_dispatcher_without_its_library_is_refused_before_a_run_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Data that are not there are not asked for yet."""
    without(monkeypatch, tmp_path, "mpi4py")
    command = [sys.executable, "-m", "dryvine.trainer", TINY, "data.source=/nowhere", "comm.dispatcher=mpi"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.endswith('pip install "dryvine[mpi]"\n')


def test_ranks_that_mpi_has_not_started_cannot_dispatch_over_it() -> None:
    """To MPI each of them is alone, and has all experts."""
    pytest.importorskip("mpi4py")
    check_library("mpi", 1)
    check_library("mpi")
    with pytest.raises(LibraryMissing, match="MPI has started 1 of the 2 ranks; start them by mpirun"):
        check_library("mpi", 2)


def test_what_no_extra_installs_is_said_as_it_is() -> None:
    assert lacking(ImportError("No module named 'mine'", name="mine")) == "No module named 'mine'"
    assert lacking(ImportError("cannot import name")) == "cannot import name"


def without(monkeypatch: pytest.MonkeyPatch, folder: Path, library: str) -> None:
    """Processes that are started from now on do not find the library."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules[{library!r}] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
