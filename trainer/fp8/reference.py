"""Quantisers in plain torch: the definition that every kernel is held against, bit for bit, and what runs on a CPU.

Bit for bit needs arithmetic that has one answer everywhere: no fused multiply-add, correctly rounded division, a
sigmoid of its own made of adds and multiplies, and a mean square summed in FP64, where the order of additions no longer
reaches the FP32 result. Agreement "up to rounding" would hide the off-by-one-tile mistakes that matter.

The recipe is DeepSeek-V3's (arXiv 2412.19437, 3.3): amax of the tile at hand, at least 1e-4, scale = amax / 448,
optionally rounded up to a power of two. Legend: R rows, C columns, F width of the FFN, P rows padded by expert to 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dryvine.comm.integers import round_up
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import E4M3, E5M6, Quantized, empty_blocks, empty_rows
from dryvine.trainer.tensors.tiles import AMAX_FLOOR, E4M3_MAX, E5M6_MAX, TILE, ScaleFormat, blocks

LOG2E = 1.4426950408889634
WHOLE = 12582912.0  # 1.5 * 2^23: added, it rounds to a whole number and leaves that in the last bits
# 2^f on [-1/2, 1/2], highest power first: a minimax fit, relative error 8e-8 before rounding.
EXP2 = (0.00132764713, 0.00967554096, 0.0555071309, 0.240221202, 0.693146944, 1.00000012)


def scale_of(amax: Tensor, scales: ScaleFormat, top: float = E4M3_MAX) -> Tensor:
    """What a tile with that amax is multiplied with when read; infinity if it holds a NaN or an infinity."""
    scale = amax.nan_to_num(nan=torch.inf, posinf=torch.inf).clamp(min=AMAX_FLOOR) / top
    if scales == "ue8m0":
        # Adding all ones below the exponent carries into it unless the mantissa is zero: round up to a power of two.
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)
    return scale


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, zero in a tile whose scale is infinite."""
    scaled, bad = x * (1.0 / scale), scale.isinf()
    return scaled.masked_fill_(bad, 0.0) if bad.any() else scaled  # a pass that is hardly ever needed


def _tiles(x: Tensor) -> Tensor:
    """[R, C] -> FP32 [R, B, 128], the last tile filled with zeros."""
    return _filled(x.float(), -x.shape[-1] % TILE).unflatten(-1, (-1, TILE))


def _filled(x: Tensor, cols: int = 0, rows: int = 0) -> Tensor:
    """With zero columns and rows behind. (`pad` by nothing would copy.)"""
    return torch.nn.functional.pad(x, (0, cols, 0, rows)) if cols or rows else x


def quantize_rows(x: Tensor, scales: ScaleFormat = "fp32") -> Quantized:
    """[R, C] -> values [R, C] in 1x128 tiles."""
    out = empty_rows(x.shape[0], x.shape[1], x.device)
    tiles = _tiles(x)
    out.scales.copy_(scale_of(tiles.abs().amax(-1), scales))
    out.values.copy_(_scaled(tiles, out.scales.unsqueeze(-1)).flatten(1)[:, : x.shape[1]].to(E4M3))
    return out


def quantize_coarse(x: Tensor, tile: str, scales: ScaleFormat = "fp32") -> Quantized:
    """`quantize_rows` with one scale for every 128x128 block, or for the whole tensor: what the recipe warns against.
    The scale is repeated for each 1x128 tile, so that every engine can show the harm."""
    out = empty_rows(x.shape[0], x.shape[1], x.device)
    tiles = _tiles(x)
    amax = tiles.abs().amax(-1)
    if tile == "tensor":
        amax = amax.max().expand_as(amax)
    else:
        whole = torch.nn.functional.pad(amax, (0, 0, 0, -len(amax) % TILE)).unflatten(0, (-1, TILE))
        amax = whole.amax(1, keepdim=True).expand_as(whole).flatten(0, 1)[: len(amax)]
    out.scales.copy_(scale_of(amax, scales))
    out.values.copy_(_scaled(tiles, out.scales.unsqueeze(-1)).flatten(1)[:, : x.shape[1]].to(E4M3))
    return out


def padded(x: Tensor, groups: ExpertGroups) -> Tensor:
    """Rows with every expert's filled up to whole blocks: [R, C] -> [P, C]."""
    return torch.cat([_filled(part, rows=-len(part) % TILE) for part in x.split(groups.counts)])


def quantize_columns(x: Tensor | Quantized, groups: ExpertGroups, scales: ScaleFormat = "fp32") -> Quantized:
    """[R, C] -> transposed, values [C, P] in 1x128 tiles over rows (128x1 tiles of x): an operand of Wgrad.

    An FP8 source is read back, transposed and quantised anew, since its tiles run the other way.
    """
    source = x.dequantize() if isinstance(x, Quantized) else x.float()
    whole = padded(source, groups)
    tiles = whole.unflatten(0, (-1, TILE))  # [B, 128, C]
    out = empty_rows(whole.shape[1], len(whole), whole.device)
    scale = scale_of(tiles.abs().amax(1), scales)
    out.scales.copy_(scale.t())
    # Turned as bytes, a quarter of the traffic.
    out.values.view(torch.uint8).copy_(_scaled(tiles, scale.unsqueeze(1)).to(E4M3).view(torch.uint8).flatten(0, 1).t())
    return out


def quantize_both(x: Tensor, groups: ExpertGroups, scales: ScaleFormat = "fp32") -> tuple[Quantized, Quantized]:
    """`quantize_rows` and `quantize_columns` of one tensor, which a kernel reads once: a gradient's two uses."""
    return quantize_rows(x, scales), quantize_columns(x, groups, scales)


def quantize_blocks(w: Tensor, scales: ScaleFormat = "fp32", whole: bool = False) -> tuple[Quantized, Quantized]:
    """[..., R, C] -> 128x128 blocks of w, and of its transpose [..., C, R]: the same bytes and scales turned round.
    `whole`: one scale for each matrix, the known bad choice."""
    rows, cols = w.shape[-2:]
    out, turned = empty_blocks(w.shape, w.device), empty_blocks((*w.shape[:-2], cols, rows), w.device)
    full = torch.nn.functional.pad(w.float(), (0, -cols % TILE, 0, -rows % TILE))
    tiles = full.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))  # [..., R / 128, 128, C / 128, 128]
    amax = tiles.abs().amax((-3, -1))
    out.scales.copy_(scale_of(amax.amax((-2, -1), keepdim=True) if whole else amax, scales))
    scaled = _scaled(tiles, out.scales[..., :, None, :, None]).flatten(-4, -3).flatten(-2, -1)
    out.values.copy_(scaled[..., :rows, :cols].to(E4M3))
    turned.values.copy_(out.values.transpose(-2, -1))
    turned.scales.copy_(out.scales.transpose(-2, -1))
    return out, turned


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x) within 3e-7, by steps that round alike on every machine."""
    t = (x.nan_to_num(nan=0.0) * -LOG2E).clamp(-120.0, 120.0)
    whole = t + WHOLE
    f = t - (whole - WHOLE)
    power, wide = torch.full_like(f, EXP2[0]), f.double()
    for coefficient in torch.tensor(EXP2[1:]).double().tolist():  # as FP32 has them
        power = torch.addcmul(torch.tensor(coefficient, dtype=torch.double), power.double(), wide).float()  # an FMA's
    power = (power.view(torch.int32) + (whole.view(torch.int32) << 23)).view(torch.float32)
    return 1.0 / (power + 1.0)


def _halves(gate_up: Tensor | Quantized) -> tuple[Tensor, ...]:
    return (gate_up.dequantize() if isinstance(gate_up, Quantized) else gate_up.float()).chunk(2, -1)


def _weigh(x: Tensor, weights: Tensor | None) -> Tensor:
    return x if weights is None else x * weights.float().unsqueeze(-1)


def swiglu_rows(
    gate_up: Tensor, weights: Tensor | None = None, scales: ScaleFormat = "fp32"
) -> tuple[Quantized, Quantized]:
    """SwiGLU and cast in one pass: [R, 2F] (gate first), row weights [R] -> the product [R, F] and gate_up [R, 2F],
    both in 1x128 tiles. The second is all that the backward keeps (V3 caches SwiGLU's inputs in FP8)."""
    gate, up = _halves(gate_up)
    return quantize_rows(_weigh(gate * sigmoid(gate) * up, weights), scales), quantize_rows(gate_up, scales)


def swiglu_backward(
    dy: Tensor, kept: Quantized, weights: Tensor | None, groups: ExpertGroups, scales: ScaleFormat = "fp32"
) -> tuple[Quantized, Quantized, Quantized, Tensor]:
    """dy [R, F] and the kept gate_up -> d gate_up as rows [R, 2F] and as columns [2F, P], the product again as columns
    [F, P], and d weights: FP32 [R], summed over F (the kernel adds in FP32, pieces of 128)."""
    gate, up = _halves(kept)
    s = sigmoid(gate)
    silu, slope = gate * s, s * (gate * (1.0 - s) + 1.0)
    dy, act = dy.float(), silu * up
    dweights = (dy * act).double().sum(-1).float()
    dy = _weigh(dy, weights)
    dh = torch.cat((dy * up * slope, dy * silu), -1)
    return *quantize_both(dh, groups, scales), quantize_columns(_weigh(act, weights), groups, scales), dweights


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[R, C] -> the normed x in x's dtype, and 1 / rms, FP32 [R, 1], for the backward."""
    square = x.double()
    mean = ((square * square).sum(-1, keepdim=True) / x.shape[-1]).float()
    inverse = 1.0 / (mean + eps).double().sqrt().float()  # torch's FP32 sqrt on a CPU is not correctly rounded
    return (x.float() * inverse * weight.float()).to(x.dtype), inverse


def rmsnorm_rows(
    x: Tensor, weight: Tensor, eps: float, scales: ScaleFormat = "fp32"
) -> tuple[Quantized, Tensor, Tensor]:
    """`rmsnorm` and cast in one pass: quantised rows, then what it gives. Quantised is the normed x as given, so that
    readers of either see one tensor."""
    normed, inverse = rmsnorm(x, weight, eps)
    return quantize_rows(normed, scales), normed, inverse


def pack_e5m6(x: Tensor) -> E5M6:
    """[R, C], C a multiple of 128, to 12 bits a value with power-of-two scales per 1x128 tile."""
    tiles = _tiles(x)
    scales = torch.empty(blocks(x.shape[1]), round_up(x.shape[0], 4), device=x.device).t()[: x.shape[0]]
    scales.copy_(scale_of(tiles.abs().amax(-1), "ue8m0", E5M6_MAX))
    code = _e5m6(_scaled(tiles, scales.unsqueeze(-1)))
    low = (code[..., :64] & 15) | ((code[..., 64:] & 15) << 4)
    return E5M6((code >> 4).to(torch.uint8).flatten(1), low.to(torch.uint8).flatten(1), scales)


def _e5m6(x: Tensor) -> Tensor:
    """FP32 -> the 12 bits, int32: FP16 rounded to nearest even at six bits of mantissa, without its last four."""
    bits = x.view(torch.int32)
    normal = ((bits + 0xFFFF + ((bits >> 17) & 1)) & ~0x1FFFF).view(torch.float32)
    # Below 2^-14 steps are 2^-20: adding 8, whose own step that is, rounds to them.
    tiny = torch.copysign((x.abs() + 8.0) - 8.0, x)
    half = torch.where(x.abs() < 2.0**-14, tiny, normal).half()
    return (half.view(torch.int16).int() & 0xFFFF) >> 4


def unpack_e5m6(packed: E5M6, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[R, C] again; exact in BF16 and FP32."""
    low = packed.low.int().unflatten(-1, (-1, 64))
    code = (packed.high.int().unflatten(-1, (-1, TILE)) << 4) | torch.cat((low & 15, low >> 4), -1)
    half = (code << 4).to(torch.int16).view(torch.float16)
    return (half.float() * packed.scales.unsqueeze(-1)).flatten(1).to(dtype)
