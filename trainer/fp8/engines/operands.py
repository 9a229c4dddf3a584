"""What engines of several libraries need: whether one can be used here, and operands in the layouts that it takes (one
expert's part, padded rows, the strides of scales). Conversions return their argument itself if it has that layout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from dryvine.comm.integers import round_up
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized
from dryvine.trainer.tensors.tiles import TILE


def imported(name: str) -> ModuleType:
    """A library. What it warns of when imported (another library that it thinks is too old) does not keep it from being
    used where warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(name)


def no_hopper(device: torch.device) -> str | None:
    """Why `device` is not a Hopper GPU, as `Engine.missing` puts it; None if it is one."""
    if device.type != "cuda":
        return f"needs a Hopper GPU, and the device is {device.type}; fp8.gemm = 'emulate' works anywhere"
    major = torch.cuda.get_device_capability(device)[0]
    return None if major == 9 else f"needs compute capability 9.x (H100, H200), and this GPU has {major}.x"


def by_expert(a: Quantized, b: Quantized, groups: ExpertGroups) -> Iterator[tuple[slice, Quantized, Quantized]]:
    """Operands of a grouped product: the rows of each expert that has any, its share of A and its B."""
    first = 0
    for expert, count in enumerate(groups.counts):
        rows = slice(first, first + count)
        first += count
        if count:
            yield (
                rows,
                Quantized(a.values[rows], a.scales[rows] if a.tile[0] == 1 else a.scales, a.tile),
                Quantized(b.values[expert], b.scales[expert], b.tile),
            )


def by_range(a: Quantized, b: Quantized, groups: ExpertGroups) -> Iterator[tuple[int, Quantized, Quantized]]:
    """Operands of wgrad: each expert that has rows, with A and B cut to its padded rows."""

    def cut(q: Quantized, first: int, last: int) -> Quantized:
        return Quantized(q.values[:, first * TILE : last * TILE], q.scales[:, first:last], q.tile)

    for expert, (first, last) in enumerate(pairwise(groups.block_starts)):
        if last > first:
            yield expert, cut(a, first, last), cut(b, first, last)


def filled(q: Quantized, multiple: int) -> Quantized:
    """Rows of 1x128 tiles, padded with zeros to a multiple."""
    extra = -len(q.values) % multiple
    if not extra:
        return q
    zeros, ones = q.values.new_zeros(extra, q.values.shape[1]), q.scales.new_ones(extra, q.scales.shape[1])
    return Quantized(torch.cat((q.values, zeros)), torch.cat((q.scales, ones)), q.tile)


def token_major(scales: Tensor) -> Tensor:
    """[R, B] with strides (1, R) exactly, where B is 1 too: `contiguous` leaves the stride of a single column alone."""
    if scales.stride() == (1, len(scales)):
        return scales
    return torch.empty_strided(scales.shape, (1, len(scales)), device=scales.device).copy_(scales)


def aligned(scales: Tensor) -> Tensor:
    """[R, B] with strides (1, R rounded up to 4) and an address that is a multiple of 16, as TMA reads. (A slice may
    have the one without the other.)"""
    rows, wide = len(scales), round_up(len(scales), 4)
    if scales.stride() == (1, wide) and scales.data_ptr() % 16 == 0:
        return scales
    return scales.new_empty(scales.shape[1], wide).t()[:rows].copy_(scales)
