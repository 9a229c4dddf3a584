"""The model's blocks with a cache: MLA on latents with its up-projections absorbed, and the FFNs of training.

They are built from the modules that training holds and read the weights in place, so after an update the next token is
the new model's without any synchronisation. What only autograd and recompute need is left out; norms, gates, SwiGLU,
expert products and FP8 Linears are the same functions, so decoding cannot differ from the trained model.

Absorption (arXiv 2405.04434, section 2.1.2): a query is multiplied by the up-projection of keys once and then compared
with the cached latents; the weighted sum of latents is multiplied by that of values. Expanding the cache to keys and
values in each step would cost heads x (nope + v) products for each cached position.

Legend: N tokens, S sequences, T tokens of one, H hidden, A heads, P cached positions, C width of a latent, R rope
dimension, W = C + R, K choices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dryvine.trainer.fp8.linear import FP8Linear
from dryvine.trainer.generate.feed import Feed
from dryvine.trainer.model.ffn import FFN
from dryvine.trainer.model.gate import Gate, route
from dryvine.trainer.model.layer import DenseLayer, Layer, MoELayer
from dryvine.trainer.model.linear import Linear
from dryvine.trainer.model.norm import RMSNorm, normalise
from dryvine.trainer.model.swiglu import swiglu_forward

Multiply = Callable[[Tensor], Tensor]  # [N, inputs] -> [N, outputs]
AddTo = Callable[[Tensor, Tensor], Tensor]  # x [N, outputs], [N, inputs] -> x + their product
ToExperts = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows [N, H], weights [N, K], experts [N, K] -> [N, H]


def multiply(linear: Linear | FP8Linear) -> Multiply:
    """x Wᵀ as the module's forward computes it (FP32, BF16 or FP8), or with weights in 8 bits."""
    if isinstance(linear, FP8Linear):
        return linear
    return linear.weight.int8.product if linear.weight.int8 is not None else times(linear.weight.detach())


def times(weight_OI: Tensor) -> Multiply:
    """x Wᵀ."""
    weight_IO = weight_OI.t()
    return lambda x_NI: torch.mm(x_NI, weight_IO)


def add_product(linear: Linear | FP8Linear) -> AddTo:
    """x + y Wᵀ; in FP32 and BF16 one operator."""
    if isinstance(linear, FP8Linear) or linear.weight.int8 is not None:
        product = multiply(linear)
        return lambda x_NO, y_NI: x_NO + product(y_NI)
    weight_IO = linear.weight.detach().t()
    return lambda x_NO, y_NI: torch.addmm(x_NO, y_NI, weight_IO)


def to_fp32(gate: Gate) -> Multiply:
    """The gate's logits, FP32."""
    return times(gate.weight.detach()) if gate.weight.dtype == torch.float32 else gate


def normed(norm: RMSNorm) -> Multiply:
    """The forward of RMSNorm, without saving anything for a backward."""
    weight, eps = norm.weight.detach(), norm.eps
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return lambda x_NH: normalise(x_NH, weight, eps)[0]
    # On a CPU, calling operators dominates a step: these are five instead of nine.
    least, share = torch.tensor(eps), 1 / len(weight)

    def run(x_NH: Tensor) -> Tensor:
        length_N1 = torch.linalg.vector_norm(x_NH, dim=-1, keepdim=True)
        return (x_NH * torch.addcmul(least, length_N1, length_N1, value=share).rsqrt_()).mul_(weight)

    return run


class CachedAttention:
    """x -> x + attention(norm(x)); the tokens' latents are written to the cache first."""

    def __init__(self, layer: Layer) -> None:
        mla, s = layer.attention, layer.attention.shape
        self.shape, self.norm, self.scale = s, normed(layer.attention_norm), mla.scale
        if s.q_lora is None:
            self.queries = multiply(mla.q)
        else:
            q_a, q_norm, q_b = multiply(mla.q_a), normed(mla.q_norm), multiply(mla.q_b)
            self.queries = lambda x_NH: q_b(q_norm(q_a(x_NH)))
        self.kv_a, self.kv_norm, self.add_o = multiply(mla.kv_a), normed(mla.kv_norm), add_product(mla.o)
        up_AdC = mla.kv_b.weight.detach().view(s.heads, s.nope_dim + s.v_dim, s.kv_lora)
        self.keys_AnC, self.values_ACv = up_AdC[:, : s.nope_dim], up_AdC[:, s.nope_dim :].transpose(1, 2)

    def __call__(self, x_NH: Tensor, feed: Feed, latents_SPW: Tensor) -> Tensor:
        normed_NH = self.norm(x_NH)
        rows_NW = self._latents(self.kv_a(normed_NH), feed)
        if feed.drafts:
            # A wrong draft's row is masked, that is multiplied by zero. If a token's own numbers are not finite, its
            # logits tell.
            rows_NW.nan_to_num_(0.0, 0.0, 0.0)
        latents_SPW[feed.slots, feed.positions] = rows_NW
        q_NAW = self._absorbed(self.queries(normed_NH), feed)
        out_NAC = attend(q_NAW, latents_SPW, feed, self.shape.kv_lora, self.scale)
        values_ANv = torch.bmm(out_NAC.transpose(0, 1), self.values_ACv)
        return self.add_o(x_NH, values_ANv.transpose(0, 1).flatten(1))

    def _latents(self, kv_NW: Tensor, feed: Feed) -> Tensor:
        """The cache row of each token: [N, W]."""
        c, rope = kv_NW[:, : self.shape.kv_lora], kv_NW[:, self.shape.kv_lora :]
        return torch.cat((self.kv_norm(c), rotate(rope, feed.cos, feed.sin)), 1)

    def _absorbed(self, q_ND: Tensor, feed: Feed) -> Tensor:
        """Queries in the space of latents: [N, A, W]."""
        q_NAD, nope = q_ND.view(-1, self.shape.heads, self.shape.qk_dim), self.shape.nope_dim
        absorbed_ANC = torch.bmm(q_NAD[..., :nope].transpose(0, 1), self.keys_AnC)
        rope_NAR = rotate(q_NAD[..., nope:], feed.cos.unsqueeze(1), feed.sin.unsqueeze(1))
        return torch.cat((absorbed_ANC.transpose(0, 1), rope_NAR), 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last dimension, in FP32. `rope.rotate` also reorders the pairs' members, which
    leaves scores unchanged."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def attend(q_NAW: Tensor, latents_SPW: Tensor, feed: Feed, width: int, scale: float) -> Tensor:
    """Softmax-weighted sums of the first `width` columns of the latents that each token may attend to: [N, A,
    width]."""
    if feed.sequences is None or feed.place is None:
        cached = latents_SPW[: len(feed.mask), : feed.length]
        q_SBW = q_NAW.view(len(cached), (1 + feed.drafts) * q_NAW.shape[1], q_NAW.shape[2])
        return _step(q_SBW, cached, feed.mask, width, scale).view(*q_NAW.shape[:2], width)
    cached = latents_SPW[feed.sequences, : feed.length]
    sequences, length = feed.mask.shape[:2]
    laid = q_NAW.new_zeros(sequences * length, *q_NAW.shape[1:]).index_copy_(0, feed.place, q_NAW)
    q_SATW = laid.unflatten(0, (sequences, length)).transpose(1, 2)
    keys = cached.unsqueeze(1).expand(-1, q_SATW.shape[1], -1, -1)
    mask = feed.mask.unsqueeze(1).to(q_NAW.dtype)
    out = functional.scaled_dot_product_attention(q_SATW, keys, keys, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)[feed.place, :, :width]


def _step(q_SBW: Tensor, cached_SPW: Tensor, mask_SBP: Tensor, width: int, scale: float) -> Tensor:
    """A token of each sequence, or several; all their heads share the sequence's latents: B = T x A."""
    if q_SBW.dtype == torch.float32:
        scores_SBP = torch.baddbmm(mask_SBP, q_SBW, cached_SPW.transpose(1, 2), alpha=scale)
        return torch.bmm(scores_SBP.softmax(-1), cached_SPW[..., :width])
    # Scores must not be rounded to BF16.
    q, rows = q_SBW.unsqueeze(1), cached_SPW.unsqueeze(1)
    mask = mask_SBP.unsqueeze(1).to(q.dtype)
    return functional.scaled_dot_product_attention(q, rows, rows, attn_mask=mask, scale=scale).squeeze(1)[..., :width]


def add_ffn(ffn: FFN) -> AddTo:
    """x + an FFN of what its norm returns."""
    if ffn.fp8 is not None:
        return lambda x_NH, rows_NH: x_NH + ffn(rows_NH)
    gate_up, add_down = multiply(ffn.gate_up), add_product(ffn.down)
    return lambda x_NH, rows_NH: add_down(x_NH, swiglu_forward(gate_up(rows_NH), None))


class CachedDense:
    def __init__(self, layer: DenseLayer) -> None:
        self.attention = CachedAttention(layer)
        self.norm, self.add_ffn = normed(layer.ffn_norm), add_ffn(layer.ffn)

    def __call__(self, x_NH: Tensor, feed: Feed, latents_SPW: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> x [N, H], and no choice of experts."""
        x_NH = self.attention(x_NH, feed, latents_SPW)
        return self.add_ffn(x_NH, self.norm(x_NH)), None


class CachedMixture:
    def __init__(self, layer: MoELayer, to_experts: ToExperts) -> None:
        self.attention, self.norm, self.to_experts = CachedAttention(layer), normed(layer.ffn_norm), to_experts
        self.add_shared = None if layer.shared is None else add_ffn(layer.shared)
        self.logits, self.bias = to_fp32(layer.gate), layer.gate.bias
        self.shape = layer.gate.shape.model_copy(update={"balance_alpha": 0.0})

    def __call__(self, x_NH: Tensor, feed: Feed, latents_SPW: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> x [N, H], and the experts chosen, int64 [N, K]."""
        x_NH = self.attention(x_NH, feed, latents_SPW)
        rows_NH = self.norm(x_NH)
        weights_NK, experts_NK, _ = route(self.logits(rows_NH), self.bias, self.shape, 1)
        if self.add_shared is not None:
            x_NH = self.add_shared(x_NH, rows_NH)
        return x_NH + self.to_experts(rows_NH, weights_NK, experts_NK), experts_NK
