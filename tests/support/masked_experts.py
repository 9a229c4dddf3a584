"""Products of experts on a CPU that take counts from the device, as a GPU's kernels do. Rows after
the last expert's are not read, whatever they hold, except in weight gradients those up to the end of its last block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dryvine.trainer.model.swiglu import swiglu_forward

BLOCK = 64  # rows that the kernel of weight gradients takes at a time


def _mask(groups: Any) -> Tensor:
    """bool [X, R]: which rows are an expert's, without a read of the counts."""
    ends = groups.counts.on_device.cumsum(0)[:, None]
    row = torch.arange(groups.rows)[None, :]
    return (row < ends) & (row >= ends - groups.counts.on_device[:, None])


def masked_product(x_RI: Tensor, weight_XOI: Tensor, groups: Any) -> Tensor:
    """NaN in rows of no expert: a GPU leaves there what the memory held."""
    mask = _mask(groups)
    live = mask.any(0)[:, None]
    by_expert = torch.einsum("ri,xoi->xro", torch.where(live, x_RI, 0), weight_XOI)
    return torch.where(live, (by_expert * mask[:, :, None]).sum(0), torch.nan)


def add_masked_product(total_XOI: Tensor, dy_RO: Tensor, x_RI: Tensor, groups: Any) -> None:
    """The kernel takes an expert's rows in blocks, and masks `dy` behind its last row, but not `x`."""
    counts = groups.counts.on_device
    mask, ends, row = _mask(groups), counts.cumsum(0)[:, None], torch.arange(groups.rows)[None, :]
    begin = ends - counts[:, None]
    touched = ((row >= begin) & (row < begin + (counts[:, None] + BLOCK - 1) // BLOCK * BLOCK)).any(0)
    dy_RO, x_RI = torch.where(mask.any(0)[:, None], dy_RO, 0), torch.where(touched[:, None], x_RI, 0)
    total_XOI += torch.einsum("xr,ro,ri->xoi", mask.float(), dy_RO, x_RI)


def masked_swiglu(gate_up_N2F: Tensor, weights_N: Tensor | None) -> Tensor:
    """As the kernel: zero in rows of weight zero."""
    found = swiglu_forward.reference(gate_up_N2F, weights_N)
    return found if weights_N is None else torch.where(weights_N[:, None] == 0, 0, found)
