"""A function in torch with a kernel of the same name: which of the two a call runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest

from dryvine.comm.by_device import kernel_in


@dataclass
class Place:
    is_cuda: bool


@kernel_in("kernels_of_this_test")
def scaled(x: Place, factor: int, *, plus: int = 0) -> tuple[str, int]:
    """Its own docstring."""
    return "torch", factor + plus


def test_a_call_runs_where_its_first_argument_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scaled(Place(False), 3, plus=1) == ("torch", 4), "and imports no kernels"
    kernels = ModuleType("kernels_of_this_test")
    kernels.scaled = lambda x, factor, *, plus=0: ("kernel", factor + plus)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    assert scaled(Place(True), 3, plus=1) == ("kernel", 4)
    assert scaled(Place(False), 3) == ("torch", 3)
    assert scaled.reference(Place(True), 3) == ("torch", 3)
    assert scaled.kernel(Place(False), 3) == ("kernel", 3)


def test_it_has_the_name_and_docstring_of_its_definition() -> None:
    assert scaled.__name__ == "scaled"  # type: ignore[attr-defined]
    assert scaled.__doc__ == "Its own docstring."
