"""Sums of rows that are the same in every run: what a CPU's threads, like a GPU's, may add in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dryvine.trainer.model.embedding import Embedding
from dryvine.trainer.rl.losses import answer_means
from dryvine.trainer.tensors.in_order import add_rows
from dryvine.trainer.tensors.weight import Weight

ROWS, WIDTH, RUNS = 8192, 64, 30


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def drawn() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(7, (ROWS,), generator=draw), torch.randn(ROWS, WIDTH, generator=draw)


def by_rows() -> Tensor:
    index, rows = drawn()
    total = torch.zeros(7, WIDTH)
    add_rows(total, index, rows)
    return total


def by_embedding() -> Tensor:
    index, rows = drawn()
    weight = Weight(torch.zeros(7, WIDTH))
    Embedding(weight)(index).backward(rows)
    return weight.gradient()


def by_answers() -> Tensor:
    index, rows = drawn()
    values = rows.flatten().requires_grad_()
    means = answer_means(values, index.repeat_interleave(WIDTH), torch.ones(len(values), dtype=torch.bool))
    (grad,) = torch.autograd.grad((means * values.detach()).sum(), values)
    return torch.stack((means.detach(), grad))


@pytest.mark.parametrize("sums", [by_rows, by_embedding, by_answers])
def test_sums_of_rows_are_the_same_in_every_run(sums: Callable[[], Tensor]) -> None:
    first = sums()
    assert all(torch.equal(sums(), first) for _ in range(RUNS))


def test_the_two_ways_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_rows()
    monkeypatch.setattr("dryvine.trainer.tensors.in_order._sorts", lambda total: True)
    torch.set_num_threads(1)
    assert torch.equal(by_rows(), found)
