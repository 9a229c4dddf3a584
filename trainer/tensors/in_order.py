"""Sums of rows in one order, and so with the same bits in every run, on any device and by any number of threads."""

from __future__ import annotations

import torch
from torch import Tensor


def add_rows(total: Tensor, index_N: Tensor, rows: Tensor) -> None:
    """total[index[n]] += rows[n], for every n. Indices may repeat; all must be in range, which a GPU does not check."""
    if _sorts(total):
        # index_add_ is by atomics there, and index_put_ sorts. `unsafe` skips the range check, for which the host
        # would wait.
        torch._index_put_impl_(total, (index_N,), rows, accumulate=True, unsafe=True)
    else:
        # Here index_put_ is by atomics, if there are several threads.
        total.index_add_(0, index_N, rows)


def _sorts(total: Tensor) -> bool:
    return total.is_cuda
