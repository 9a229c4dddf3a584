"""Multi-head latent attention (arXiv 2412.19437, section 2.1.1) in training form: latents are expanded to full heads.

Absorbing the up-projections into the scores saves KV cache, which training does not have, and costs kv_lora-wide
products per head and position. For training, activation memory matters: with recompute "mla_up", queries, keys and
values are recomputed from the latents in the backward, while the attention core itself runs once.

Legend: N = S * T tokens, S sequences, T positions, A heads, H hidden.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from dryvine.trainer.model.documents import Documents
from dryvine.trainer.model.norm import Normed, RMSNorm, through_norm
from dryvine.trainer.model.qkv import Heads, assemble
from dryvine.trainer.model.recompute import through
from dryvine.trainer.model.rope import softmax_scale
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.model.varlen import attend_documents, pad_heads, spread


class MLA(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        s = self.shape = spec.shape
        self.rope, self.scale = spec.rope, softmax_scale(s)
        q_out = s.heads * s.qk_dim
        if s.q_lora is None:
            self.q = spec.linear(s.hidden, q_out)
        else:
            self.q_a, self.q_norm, self.q_b = (
                spec.linear(s.hidden, s.q_lora),
                spec.norm(s.q_lora, feeds_linear=True),
                spec.linear(s.q_lora, q_out),
            )
        self.kv_a = spec.linear(s.hidden, s.kv_lora + s.rope_dim)
        self.kv_norm = spec.norm(s.kv_lora, feeds_linear=True)
        self.kv_b = spec.linear(s.kv_lora, s.heads * (s.nope_dim + s.v_dim))
        self.o = spec.linear(s.heads * s.v_dim, s.hidden, after_attention=True)

    def down(self, normed: Normed) -> tuple[Tensor, Tensor]:
        """Normed hidden states -> (query latent, or the hidden states without q_lora; KV latent with the shared rope
        key)."""
        return (self.q if self.shape.q_lora is None else self.q_a)(*normed), self.kv_a(*normed)

    def attend(self, q_latent: Tensor, kv_latent: Tensor, sequences: int, documents: Documents | None = None) -> Tensor:
        """Latents of `sequences` equally long sequences -> [N, H]. With `documents`, attention is within documents."""
        again = "mla_up" in self.shape.recompute
        if documents is not None:
            out_NAv = through(
                lambda: self._up_packed(q_latent, kv_latent, documents),
                lambda q, k, v: attend_documents(q, k, v, documents, self.scale)[..., : self.shape.v_dim],
                again,
            )
            return self.o(out_NAv.flatten(1))
        out_SATv = through(lambda: self._up(q_latent, kv_latent, sequences), self._core, again)
        out_NI = out_SATv.transpose(1, 2).flatten(2).flatten(0, 1)
        # A view, if the core has left heads of a token side by side; else a copy, which nothing else keeps.
        return self.o(out_NI, kept=out_NI.data_ptr() == out_SATv.data_ptr())

    def _up_packed(self, q_latent: Tensor, kv_latent: Tensor, documents: Documents) -> Heads:
        """-> q, k and v [P, A, width], as the core over documents takes them."""
        heads = self._heads(q_latent, kv_latent, self.rope.packed(documents))
        q, k, v = (t.squeeze(0).transpose(0, 1) for t in heads)  # a table of N rows is one sequence to `assemble`
        return spread(pad_heads(q, k, v), documents)

    def _core(self, q_SATd: Tensor, k_SATd: Tensor, v_SATd: Tensor) -> Tensor:
        out = functional.scaled_dot_product_attention(q_SATd, k_SATd, v_SATd, is_causal=True, scale=self.scale)
        return out[..., : self.shape.v_dim]

    def _up(self, q_latent: Tensor, kv_latent: Tensor, sequences: int) -> Heads:
        """-> q, k [S, A, T, qk_dim] and v, at least v_dim wide."""
        return self._heads(q_latent, kv_latent, self.rope.table(len(q_latent) // sequences, q_latent.device))

    def _heads(self, q_latent: Tensor, kv_latent: Tensor, table: tuple[Tensor, Tensor]) -> Heads:
        s = self.shape
        c, k_rope = kv_latent.split((s.kv_lora, s.rope_dim), -1)
        q, kv = self._queries(q_latent), self._normed(self.kv_norm, c, self.kv_b)
        return assemble(q.unflatten(1, (s.heads, -1)), kv.unflatten(1, (s.heads, -1)), k_rope, table)

    def _queries(self, q_latent: Tensor) -> Tensor:
        """A new tensor, which `assemble` may overwrite; recompute may need the latent again."""
        return q_latent.clone() if self.shape.q_lora is None else self._normed(self.q_norm, q_latent, self.q_b)

    def _normed(self, norm: RMSNorm, latent: Tensor, up: nn.Module) -> Tensor:
        return through_norm(norm, latent, lambda normed: up(*normed), again="norm" in self.shape.recompute)
