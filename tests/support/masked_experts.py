"""Products of experts on a CPU that take counts from the device, as a GPU's kernels do. What lies behind the last
expert's rows is never read, whatever it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
    mask = _mask(groups)
    live = mask.any(0)[:, None]
    dy_RO, x_RI = torch.where(live, dy_RO, 0), torch.where(live, x_RI, 0)
    total_XOI += torch.einsum("xr,ro,ri->xoi", mask.float(), dy_RO, x_RI)
