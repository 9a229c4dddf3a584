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
from dryvine.trainer.model.gate import route
from dryvine.trainer.model.layer import DenseLayer, Layer, MoELayer
from dryvine.trainer.model.linear import Linear
from dryvine.trainer.model.norm import RMSNorm, normalise
from dryvine.trainer.model.swiglu import swiglu_forward

Multiply = Callable[[Tensor], Tensor]  # [N, inputs] -> [N, outputs]
ToExperts = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows [N, H], weights [N, K], experts [N, K] -> [N, H]


def multiply(linear: Linear | FP8Linear) -> Multiply:
    """x Wᵀ as the module's forward computes it (FP32, BF16 or FP8)."""
    if isinstance(linear, FP8Linear):
        return linear
    weight_IO = linear.weight.detach().t()
    return lambda x_NI: torch.mm(x_NI, weight_IO)


def normed(norm: RMSNorm) -> Multiply:
    """The forward of RMSNorm, without saving anything for a backward."""
    weight, eps = norm.weight.detach(), norm.eps
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return lambda x_NH: normalise(x_NH, weight, eps)[0]
    # On a CPU, calling operators dominates a step: these are five instead of nine.
    least, share = torch.tensor(eps), 1 / len(weight)

    def run(x_NH: Tensor) -> Tensor:
        length_N1 = torch.linalg.vector_norm(x_NH, dim=-1, keepdim=True)
        return x_NH * torch.addcmul(least, length_N1, length_N1, value=share).rsqrt_() * weight

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
        self.kv_a, self.kv_norm, self.o = multiply(mla.kv_a), normed(mla.kv_norm), multiply(mla.o)
        up = mla.kv_b.weight.detach().view(s.heads, s.nope_dim + s.v_dim, s.kv_lora)
        self.keys_AnC, self.values_AvC = up.split((s.nope_dim, s.v_dim), 1)

    def __call__(self, x_NH: Tensor, feed: Feed, latents_SPW: Tensor) -> Tensor:
        normed_NH = self.norm(x_NH)
        rows_NW = self._latents(self.kv_a(normed_NH), feed.turn)
        if feed.drafts:
            # A wrong draft's row is masked, that is multiplied by zero. If a token's own numbers are not finite, its
            # logits tell.
            rows_NW.nan_to_num_(0.0, 0.0, 0.0)
        latents_SPW[feed.slots, feed.positions] = rows_NW
        q_NAW = self._absorbed(self.queries(normed_NH), feed.turn)
        out_NAC = attend(q_NAW, latents_SPW, feed, self.shape.kv_lora)
        values_ANv = torch.bmm(out_NAC.transpose(0, 1), self.values_AvC.transpose(1, 2))
        return x_NH + self.o(values_ANv.transpose(0, 1).flatten(1))

    def _latents(self, kv_NW: Tensor, turn: Tensor) -> Tensor:
        """The cache row of each token: [N, W]."""
        c, rope = kv_NW.split((self.shape.kv_lora, self.shape.rope_dim), 1)
        return torch.cat((self.kv_norm(c), rotate(rope.unsqueeze(1), turn).squeeze(1)), 1)

    def _absorbed(self, q: Tensor, turn: Tensor) -> Tensor:
        """Queries in the space of latents, scaled for the softmax: [N, A, W]."""
        q_NAD = q.unflatten(1, (self.shape.heads, -1)) * self.scale
        nope, rope = q_NAD.split((self.shape.nope_dim, self.shape.rope_dim), 2)
        return torch.cat((torch.bmm(nope.transpose(0, 1), self.keys_AnC).transpose(0, 1), rotate(rope, turn)), 2)


def rotate(x_NAR: Tensor, turn: Tensor) -> Tensor:
    """Rotate neighbouring pairs in place of each other. `rope.rotate` also reorders the pairs' members, which leaves
    scores unchanged."""
    pairs = torch.view_as_complex(x_NAR.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x_NAR.dtype)


def attend(q_NAW: Tensor, latents_SPW: Tensor, feed: Feed, width: int) -> Tensor:
    """Softmax-weighted sums of the first `width` columns of the latents that each token may attend to: [N, A,
    width]."""
    if feed.sequences is None or feed.place is None:
        cached = latents_SPW[: feed.mask.shape[0], : feed.length]
        q_SBW = q_NAW.view(len(cached), (1 + feed.drafts) * q_NAW.shape[1], q_NAW.shape[2])
        return _step(q_SBW, cached, feed.mask, width).view(*q_NAW.shape[:2], width)
    cached = latents_SPW[feed.sequences, : feed.length]
    sequences, length = feed.mask.shape[0], feed.mask.shape[2]
    laid = q_NAW.new_zeros(sequences * length, *q_NAW.shape[1:]).index_copy_(0, feed.place, q_NAW)
    q_SATW = laid.unflatten(0, (sequences, length)).transpose(1, 2)
    keys = cached.unsqueeze(1).expand(-1, q_SATW.shape[1], -1, -1)
    mask = feed.mask.to(q_NAW.dtype)
    out = functional.scaled_dot_product_attention(q_SATW, keys, keys, attn_mask=mask, scale=1.0)
    return out.transpose(1, 2).flatten(0, 1)[feed.place, :, :width]


def _step(q_SBW: Tensor, cached_SPW: Tensor, mask_S1BP: Tensor, width: int) -> Tensor:
    """A token of each sequence, or several; all their heads share the sequence's latents: B = T x A."""
    if q_SBW.dtype == torch.float32:
        scores_SBP = torch.baddbmm(mask_S1BP.squeeze(1), q_SBW, cached_SPW.transpose(1, 2))
        return torch.bmm(scores_SBP.softmax(-1), cached_SPW[..., :width])
    # Scores must not be rounded to BF16.
    q, rows = q_SBW.unsqueeze(1), cached_SPW.unsqueeze(1)
    mask = mask_S1BP.to(q.dtype)
    return functional.scaled_dot_product_attention(q, rows, rows, attn_mask=mask, scale=1.0).squeeze(1)[..., :width]


def _ffn(norm: RMSNorm, ffn: FFN) -> tuple[Multiply, Multiply]:
    """The norm before an FFN, and the FFN applied to it."""
    if ffn.fp8 is not None:
        return normed(norm), ffn
    gate_up, down = multiply(ffn.gate_up), multiply(ffn.down)
    return normed(norm), lambda x_NH: down(swiglu_forward(gate_up(x_NH), None))


class CachedDense:
    def __init__(self, layer: DenseLayer) -> None:
        self.attention = CachedAttention(layer)
        self.norm, self.ffn = _ffn(layer.ffn_norm, layer.ffn)

    def __call__(self, x_NH: Tensor, feed: Feed, latents_SPW: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> x [N, H], and no choice of experts."""
        x_NH = self.attention(x_NH, feed, latents_SPW)
        return x_NH + self.ffn(self.norm(x_NH)), None


class CachedMixture:
    def __init__(self, layer: MoELayer, to_experts: ToExperts) -> None:
        self.attention, self.norm, self.to_experts = CachedAttention(layer), normed(layer.ffn_norm), to_experts
        self.shared = None if layer.shared is None else _ffn(layer.ffn_norm, layer.shared)[1]
        self.gate, self.shape = layer.gate, layer.gate.shape.model_copy(update={"balance_alpha": 0.0})

    def __call__(self, x_NH: Tensor, feed: Feed, latents_SPW: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> x [N, H], and the experts chosen, int64 [N, K]."""
        x_NH = self.attention(x_NH, feed, latents_SPW)
        rows_NH = self.norm(x_NH)
        weights_NK, experts_NK, _ = route(self.gate(rows_NH), self.gate.bias, self.shape, 1)
        if self.shared is not None:
            x_NH = x_NH + self.shared(rows_NH)
        return x_NH + self.to_experts(rows_NH, weights_NK, experts_NK), experts_NK
