"""What many tests need: a small real corpus, and the tiny config on it."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dryvine.comm import local
from dryvine.trainer.config import Config, load
from dryvine.trainer.data.build import build
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.spec import BuildSpec

HERE = Path(__file__).parent
pytest_plugins = ("tests.support.digits",)  # fixtures of several files of tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prove", action="store_true", help="full counts (`make prove`): hours, run by hand in parts")


@pytest.fixture(scope="session")
def count(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """`count(5, 40)`: 5 repetitions in `make test` and `make test-long`, 40 in `make prove`."""
    return lambda reduced, full: full if pytestconfig.getoption("--prove") else reduced


# As ranks have: sums differ in their last bit with the number of threads.
torch.set_num_threads(1)
local.preload("dryvine.trainer.verify", "dryvine.trainer.loop", "matplotlib.pyplot")  # what ranks of tests import


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of a few standard library files, vocabulary 320."""
    folder = tmp_path_factory.mktemp("corpus")
    pattern = Path(sysconfig.get_path("stdlib")) / "a*.py"
    build(match_files([str(pattern)]), BuildSpec(vocab_size=320, validation_fraction=0.3), folder)
    return folder


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path) -> Callable[..., Config]:
    """`tiny("parallel.pp=2", ...)`: the tiny config with overrides, its run folder under the test's own."""

    def make(*overrides: str) -> Config:
        return load(HERE / "tiny.toml", (f'data.source="{corpus}"', f'run.out="{tmp_path}"', *overrides))

    return make


@pytest.fixture
def tinier(tiny: Callable[..., Config]) -> Callable[..., Config]:
    """`tiny` with three layers, two of them with experts, and 8 sequences a step: a quarter of the time. For tests of
    what a run does around its steps, which no more layers and microbatches would test better."""
    return lambda *overrides: tiny("model.layers=3", "batch.sequences=8", *overrides)
