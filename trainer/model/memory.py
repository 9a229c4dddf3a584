"""What a microbatch in flight keeps from F to B: every tensor, why it is kept, and its bytes, from the numbers alone.

Torch-free, as the shape is: memory is asked about on a login node, for layouts nobody has yet. The alternative, running
a stage on fake tensors, would follow the code by itself, but needs torch, gives no reasons, and stops at the first
read on the host. So the rules are written down a second time here, and a test holds them to a census of the storages
that a real stage leaves behind, for every kind of block, recipe and recompute.

Legend: N tokens of a microbatch, R rows of this rank's experts, H hidden, F width of an FFN, K choices per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from dryvine.trainer.fp8.recipe import Recipe
from dryvine.trainer.model.shape import Shape, blocks
from dryvine.trainer.tensors.tiles import TILE


class Kept(NamedTuple):
    block: str
    phase: str
    what: str
    reader: str  # whose backward reads it
    bytes: int


@dataclass(frozen=True)
class Load:
    """A microbatch on one rank: `sequences` of together `tokens`, and how many `rows` come to the rank's experts.

    `wide` is the bytes of a number in run.dtype. `cuda` False: a CPU's attention wants values as wide as queries.
    `alone`: the rank holds all experts, and its rows are put in order once, not on both sides of an exchange.
    """

    tokens: int
    sequences: int
    rows: int
    wide: int = 2
    cuda: bool = True
    alone: bool = False

    @staticmethod
    def even(shape: Shape, tokens: int, sequences: int, wide: int = 2, cuda: bool = True, alone: bool = False) -> Load:
        """Rows as they are when experts are chosen alike: as many as a rank's own tokens send."""
        return Load(tokens, sequences, tokens * shape.top_k, wide, cuda, alone)


def kept(shape: Shape, recipe: Recipe, names: Iterable[str], load: Load) -> tuple[Kept, ...]:
    """Of the blocks of one stage (`names` as in `shape.blocks`), in forward order. What all microbatches share, weights
    and their FP8 copies, is not in it; routing is as the dispatcher `flat` keeps it. Scalars are left out."""
    kinds = {block.name: block.kind for block in blocks(shape)}
    keeper = _Keeper(shape, recipe, load)
    rules = {"embed": keeper.embed, "dense": keeper.dense, "moe": keeper.moe, "head": keeper.head, "mtp": keeper.mtp}
    return tuple(Kept(name, *row) for name in names for row in rules[kinds[name]](name) if row[-1])


def kept_bytes(shape: Shape, recipe: Recipe, names: Iterable[str], load: Load) -> int:
    return sum(row.bytes for row in kept(shape, recipe, names, load))


Row = tuple[str, str, str, int]  # phase, what, reader, bytes


@dataclass(frozen=True)
class _Keeper:
    shape: Shape
    recipe: Recipe
    load: Load

    # -- sizes

    def wide(self, rows: int, width: int) -> int:
        """In run.dtype."""
        return rows * width * self.load.wide

    def fine(self, rows: int, width: int) -> int:
        """E4M3 with FP32 scales of 1x128 tiles, whose rows are padded to 4."""
        return rows * width + 4 * _up(width, TILE) // TILE * _up(rows, 4)

    def again(self, what: str) -> bool:
        return what in self.shape.recompute

    # -- blocks

    def embed(self, name: str) -> Iterator[Row]:
        yield "embed", "tokens", "embedding", self._tokens()

    def dense(self, name: str) -> Iterator[Row]:
        yield from self._attention("dense")
        yield from self._norm("dense", "x after attention", self.shape.hidden, "FFN")
        yield from self._ffn("dense", "FFN", self.load.tokens, self.shape.ffn)

    def moe(self, name: str) -> Iterator[Row]:
        s, load = self.shape, self.load
        yield from self._attention("attention")
        yield from self._norm("attention", "x after attention", s.hidden, "shared experts" if s.shared else "", "gate")
        if s.shared:
            yield from self._ffn("attention", "shared experts", load.tokens, s.shared * s.expert_ffn)
        yield from self._gate()
        indexes = 3 * load.tokens * s.top_k + load.tokens + (0 if load.alone else 2 * load.rows)
        yield "routing", "routing of rows, there and back", "dispatch, combine", 8 * indexes
        yield from self._experts()

    def head(self, name: str) -> Iterator[Row]:
        yield from self._head(depth=0)

    def mtp(self, name: str) -> Iterator[Row]:
        n, hidden, depth = self.load.tokens, self.shape.hidden, int(name.removeprefix("mtp.")) + 1
        yield "attention", "tokens", "embedding", self._tokens()
        yield "attention", "embedding of the next token", "norm_e", self.wide(n, hidden) + 4 * n
        yield "attention", "1 / rms of the depth before", "norm_h", 4 * n  # its x is kept as that head's normed x
        yield "attention", "both, normed", "project", self._operand(n, 2 * hidden)
        yield from self.moe(name)
        yield from self._head(depth)

    # -- parts

    def _tokens(self) -> int:
        """A copy, where sequences are cut out of longer ones: of a single one it is a view."""
        return 8 * self.load.tokens if self.load.sequences > 1 else 0

    def _operand(self, rows: int, width: int) -> int:
        """A normed tensor that a Linear reads."""
        if self.recipe.fp8:
            return self.fine(rows, width)
        return 0 if self.again("norm") else self.wide(rows, width)

    def _norm(self, phase: str, what: str, width: int, linear: str, plain: str = "") -> Iterator[Row]:
        """A norm's input, and its output for a `linear` of the recipe and for a `plain` one in run.dtype."""
        n = self.load.tokens
        yield phase, f"{what}, 1 / rms", "norm", self.wide(n, width) + 4 * n
        if linear:
            yield phase, f"{what}, normed", linear, self._operand(n, width)
        if plain and (self.recipe.fp8 or not linear):  # else both read one tensor
            yield phase, f"{what}, normed", plain, 0 if self.again("norm") else self.wide(n, width)

    def _attention(self, phase: str) -> Iterator[Row]:
        s, n = self.shape, self.load.tokens
        yield from self._norm(phase, "x", s.hidden, "q, kv_a" if s.q_lora is None else "q_a, kv_a")
        if s.q_lora is not None:
            yield from self._norm(phase, "query latent", s.q_lora, "q_b")
        yield phase, "key-value latent, rope key, 1 / rms", "norm", self.wide(n, s.kv_lora + s.rope_dim) + 4 * n
        yield phase, "key-value latent, normed", "kv_b", self._operand(n, s.kv_lora)
        yield from self._core(phase)

    def _core(self, phase: str) -> Iterator[Row]:
        s, n, cuda = self.shape, self.load.tokens, self.load.cuda
        if not self.again("mla_up"):
            # On CUDA values are a view of what kv_b gave, keys without rope and all.
            values = s.nope_dim + s.v_dim if cuda else max(s.qk_dim, s.v_dim)
            yield phase, "queries, keys, values", "attention core", self.wide(n, s.heads * (2 * s.qk_dim + values))
        elif s.q_lora is None:
            yield phase, "queries before rope", "attention core, by recompute", self.wide(n, s.heads * s.qk_dim)
        out = s.v_dim if cuda else max(s.qk_dim, s.v_dim)
        yield phase, "output of the heads, log-sum-exp", "attention core", self.wide(n, s.heads * out) + 4 * n * s.heads
        yield phase, "output of the heads", "o", self._after_attention(out)

    def _after_attention(self, out: int) -> int:
        n, width = self.load.tokens, self.shape.heads * self.shape.v_dim
        if not self.recipe.fp8:
            return self.wide(n, width) if out > self.shape.v_dim else 0  # else it is the core's own output
        if self.recipe.cache_after_attention == "fp8":
            return self.fine(n, width)
        return n * _up(width, TILE) * 3 // 2 + 4 * _up(width, TILE) // TILE * _up(n, 4)

    def _ffn(self, phase: str, reader: str, rows: int, width: int) -> Iterator[Row]:
        if self.recipe.fp8:
            yield phase, "gate and up", reader, self.fine(rows, 2 * width)
            return
        yield phase, "gate and up", reader, self.wide(rows, 2 * width)
        yield phase, "their SwiGLU", reader, 0 if self.again("swiglu") else self.wide(rows, width)

    def _gate(self) -> Iterator[Row]:
        s, n = self.shape, self.load.tokens
        yield "attention", "choices", "gate", 8 * n * s.top_k
        if self.load.cuda:
            yield from self._fused_gate()
            return
        yield "attention", "scores", "gate", 4 * n * s.routed
        if s.normalise:
            yield "attention", "weights and their sums", "gate", 4 * n * (s.top_k + 1)
        if s.balance_alpha:
            yield "attention", "shares of experts, sums", "balance loss", 4 * self.load.sequences * s.routed + 8 * n

    def _fused_gate(self) -> Iterator[Row]:
        s, n = self.shape, self.load.tokens
        if s.sparse_gate:
            yield "attention", "scores of the chosen", "gate", 4 * n * s.top_k
        else:
            yield "attention", "logits", "gate", 4 * n * s.routed
        if s.balance_alpha:
            yield "attention", "tallies of experts", "balance loss", 4 * self.load.sequences * s.routed

    def _experts(self) -> Iterator[Row]:
        s, rows = self.shape, self.load.rows
        if not self.recipe.fp8_dispatch:
            yield "experts", "arrived rows", "experts", self.wide(rows, s.hidden)
        if self.recipe.fp8:
            yield "experts", "arrived rows in FP8", "experts", self.fine(rows, s.hidden)
        yield "experts", "weights of rows", "SwiGLU", 4 * rows
        yield from self._ffn("experts", "experts", rows, s.expert_ffn)

    def _head(self, depth: int) -> Iterator[Row]:
        s, n = self.shape, self.load.tokens
        yield "head", "x, 1 / rms", "norm", self.wide(n, s.hidden) + 4 * n
        if depth < s.mtp_depth:
            yield "head", "x, normed", "head, norm_h of the next depth", self.wide(n, s.hidden)
        else:
            yield "head", "x, normed", "head", 0 if self.again("norm") else self.wide(n, s.hidden)
        yield "head", "logits", "loss", self.wide(n, s.vocab)
        yield "head", "targets, log-sum-exp", "loss", self._tokens() + 4 * n


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
