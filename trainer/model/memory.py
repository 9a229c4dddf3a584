"""Activation memory: every tensor that a microbatch keeps from F to B, the op whose backward reads it, and its bytes.

Computed from the shape alone and without torch, since memory is planned on a login node, for layouts that have never
run. Running a stage on fake tensors would follow the code automatically, but needs torch, does not tell which backward
reads a tensor, and fails at the first read on the host. So the rules are repeated here, and a test compares them with
the storages that a real stage keeps, for every kind of block, recipe and recompute option.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from dryvine.comm.integers import round_up
from dryvine.trainer.fp8.recipe import Recipe
from dryvine.trainer.model.shape import LAYER_PHASES, Shape, blocks
from dryvine.trainer.tensors.tiles import TILE

# Elements of the logits that the loss converts to FP32 at a time: 4 MiB, which fits a CPU's cache.
SLICE_ELEMENTS = 1 << 20


class SavedTensor(NamedTuple):
    block: str
    phase: str
    what: str
    reader: str  # whose backward reads it
    bytes: int


@dataclass(frozen=True)
class MicrobatchSize:
    """A microbatch on one rank: `tokens` in `sequences`. Perfect load balance is assumed: the rank's experts receive as
    many rows as its tokens send."""

    tokens: int
    sequences: int
    dtype_bytes: int = 2  # of run.dtype
    cuda: bool = True  # a CPU's attention core wants values as wide as queries
    documents: bool = False  # attention inside documents, whose kernel wants values as wide as queries, too
    single_rank: bool = False  # all experts are here: rows are ordered once, not on both sides of an exchange
    room: float = 1.0  # for so many times as many rows at the experts
    core: int = 1  # times `tokens`: what attention gets where documents share their beginnings
    ep: int = 1  # expert-parallel ranks, each with as many of the experts


def saved_tensors(shape: Shape, recipe: Recipe, names: Iterable[str], size: MicrobatchSize) -> tuple[SavedTensor, ...]:
    """The saved tensors of the blocks of one stage (`names` as in `shape.blocks`), in forward order.

    Scalars are left out, and what all microbatches share: weights and their FP8 copies. Routing tensors are those of
    the dispatcher `flat`.
    """
    kinds = {block.name: block.kind for block in blocks(shape)}
    rules = _Rules(shape, recipe, size)
    return tuple(SavedTensor(name, *row) for name in names for row in rules.kept(kinds[name], name) if row[-1])


def saved_bytes(shape: Shape, recipe: Recipe, names: Iterable[str], size: MicrobatchSize) -> int:
    return sum(row.bytes for row in saved_tensors(shape, recipe, names, size))


# What no weight gradient reads, so that I frees it: readers, and what others keep beside operands of Linears.
FREED_READERS = frozenset(("attention core", "balance loss", "norm", "norm_e", "norm_h"))
FREED = frozenset(("gate and up", "choices", "scores", "scores of the chosen", "weights and their sums"))


def deferred_bytes(shape: Shape, recipe: Recipe, names: Iterable[str], size: MicrobatchSize) -> int:
    """Bytes that a flight keeps from I to W beyond those from F to I: gradients of every Linear's output and what I has
    recomputed, less what it has freed, which may be more. The gradients of the logits reuse their memory."""
    names = tuple(names)
    kinds = {block.name: block.kind for block in blocks(shape)}
    rules = _Rules(shape, recipe, size)
    # Queries, keys and values are freed, recomputed or not.
    ways = tuple(way for way in shape.recompute if way == "mla_up")
    made = saved_tensors(shape.model_copy(update={"recompute": ways}), recipe, names, size)
    what = FREED | {"arrived rows"} if recipe.fp8 else FREED  # experts in FP8 read their cast
    freed = sum(row.bytes for row in made if row.what in what or _freed_by_reader(made, row))
    again = sum(row.bytes for row in made) - saved_bytes(shape, recipe, names, size)
    return sum(rules.left(kinds[name]) for name in names) + again - freed


def _freed_by_reader(rows: Iterable[SavedTensor], row: SavedTensor) -> bool:
    if row.what == "output of the heads":  # kept on where `o` reads it, and not a tensor of its own
        return row.reader == "attention core" and any(
            other.block == row.block and other.what == row.what and other.reader == "o" for other in rows
        )
    return row.reader in FREED_READERS or (row.what == "logits" and row.reader == "gate")


def remade_bytes(shape: Shape, recipe: Recipe, kind: str, size: MicrobatchSize) -> int:
    """Bytes that the backward of a block recomputes at a time with `recompute = ["layer"]`, in the phase with most."""
    if "layer" not in shape.recompute or kind in ("embed", "head"):
        return 0
    name = next(block.name for block in blocks(shape) if block.kind == kind)
    plain = shape.model_copy(update={"recompute": _of_tensors(shape)})
    by_phase: dict[str, int] = {}
    for row in saved_tensors(plain, recipe, [name], size):
        by_phase[row.phase] = by_phase.get(row.phase, 0) + row.bytes
    return max(by_phase.get(phase, 0) for phase in remade_phases(shape, recipe))


def remade_phases(shape: Shape, recipe: Recipe) -> tuple[str, ...]:
    """Phases that are recomputed in the backward. Experts with FP8 dispatch are not: they keep little else."""
    if "layer" not in shape.recompute:
        return ()
    return LAYER_PHASES[:-1] if recipe.fp8_dispatch else LAYER_PHASES


def _of_tensors(shape: Shape) -> tuple[str, ...]:
    return tuple(way for way in shape.recompute if way != "layer")


class PassedBytes(NamedTuple):
    """Bytes of what phases hand to the next and no flight keeps: of all phases of a forward, and of a backward."""

    forward: int
    backward: int


def passed_bytes(shape: Shape, recipe: Recipe, names: Iterable[str], size: MicrobatchSize) -> PassedBytes:
    """Of the blocks of one stage, whose backward ends with the gradient of its input."""
    kinds = {block.name: block.kind for block in blocks(shape)}
    rules = _Rules(shape, recipe, size)
    every = [rules.passed(kinds[name]) for name in names]
    end = 0 if recipe.fp8 else rules.in_dtype(size.tokens, shape.hidden)
    return PassedBytes(sum(one.forward for one in every), sum(one.backward for one in every) + end)


Row = tuple[str, str, str, int]  # phase, what, reader, bytes


@dataclass(frozen=True)
class _Rules:
    shape: Shape
    recipe: Recipe
    size: MicrobatchSize

    # -- sizes

    def in_dtype(self, rows: int, width: int) -> int:
        """In run.dtype."""
        return rows * width * self.size.dtype_bytes

    def in_fp8(self, rows: int, width: int) -> int:
        """E4M3 with FP32 scales of 1x128 tiles, whose rows are padded to 4."""
        return rows * width + 4 * round_up(width, TILE) // TILE * round_up(rows, 4)

    def recomputed(self, what: str) -> bool:
        return what in self.shape.recompute

    @property
    def rows(self) -> int:
        return ceil(self.size.tokens * self.shape.top_k * self.size.room)

    # -- blocks

    def kept(self, kind: str, name: str) -> Iterator[Row]:
        by_kind = {"embed": self.embed, "dense": self.dense, "moe": self.moe, "head": self.head, "mtp": self.mtp}
        rows = by_kind[kind](name)
        yield from self._inputs_of_layers(kind, rows) if self.recomputed("layer") else rows

    def _inputs_of_layers(self, kind: str, rows: Iterator[Row]) -> Iterator[Row]:
        """The inputs from which whole layers are recomputed; kept in place of the layers' saved tensors."""
        if kind in ("dense", "moe"):  # an MTP module's x is counted as the normed x of the head before
            x = self.in_dtype(self.size.tokens, self.shape.hidden)
            yield "dense" if kind == "dense" else "attention", "x", "recompute", x
        again = remade_phases(self.shape, self.recipe)
        yield from (row for row in rows if row[0] not in again or row[1] in ("arrived rows", "weights of rows"))

    def embed(self, name: str) -> Iterator[Row]:
        yield "embed", "tokens", "embedding", self._tokens()

    def dense(self, name: str) -> Iterator[Row]:
        yield from self._attention("dense")
        yield from self._norm("dense", "x after attention", self.shape.hidden, "FFN")
        yield from self._ffn("dense", "FFN", self.size.tokens, self.shape.ffn)

    def moe(self, name: str) -> Iterator[Row]:
        s, n = self.shape, self.size.tokens
        yield from self._attention("attention")
        yield from self._norm("attention", "x after attention", s.hidden, "shared experts" if s.shared else "", "gate")
        if s.shared:
            yield from self._ffn("attention", "shared experts", n, s.shared * s.expert_ffn)
        yield from self._gate()
        # int64: each pair's number, token and place in the order sent, bounds of sums; and the rows that arrive, twice.
        indexes = 3 * n * s.top_k + n + (0 if self.size.single_rank else 2 * self.rows)
        yield "routing", "order of rows, there and back", "dispatch, combine", 8 * indexes
        yield from self._experts()

    def head(self, name: str) -> Iterator[Row]:
        yield from self._head(depth=0)

    def mtp(self, name: str) -> Iterator[Row]:
        n, hidden, depth = self.size.tokens, self.shape.hidden, int(name.removeprefix("mtp.")) + 1
        yield "attention", "tokens", "embedding", self._tokens()
        yield "attention", "embedding of the next token", "norm_e", self.in_dtype(n, hidden) + 4 * n
        # Its x is counted as the normed x of the head before.
        yield "attention", "1 / rms of the depth before", "norm_h", 4 * n
        yield "attention", "both, normed", "project", self._operand(n, 2 * hidden)
        yield from self.moe(name)
        yield from self._head(depth)

    def left(self, kind: str) -> int:
        """Of one block, by its I."""
        s, n, head = self.shape, self.size.tokens, self.in_dtype(self.size.tokens, self.shape.hidden)
        if kind == "embed":
            return head
        if kind == "head":
            return 0
        # FP8's FFNs keep no product of gate and up: its cast by columns is made in I.
        extra = 1 if self.recipe.fp8 else 0
        ffn = self._linears(n, (2 + extra) * s.ffn, s.hidden)
        if kind != "dense":
            shared = self._linears(n, (2 + extra) * s.shared * s.expert_ffn, s.hidden) if s.shared else 0
            routed = self._linears(self.rows, (2 + extra) * s.expert_ffn, s.hidden)
            ffn = shared + routed + 4 * n * s.routed
        q = (s.heads * s.qk_dim,) if s.q_lora is None else (s.q_lora, s.heads * s.qk_dim)
        kv = (s.kv_lora + s.rope_dim, s.heads * (s.nope_dim + s.v_dim))
        join = self._linears(n, s.hidden) + head if kind == "mtp" else 0
        return ffn + self._linears(n, *q, *kv, s.hidden) + join

    def passed(self, kind: str) -> PassedBytes:
        """Of one block. A layer without experts hands on what its neighbours keep: in a forward their input, in a
        backward the gradient of a Linear's output, of which FP8 keeps a cast. Its own input, which the norm alone has
        read, is read a last time."""
        s, n, x = self.shape, self.size.tokens, self.in_dtype(self.size.tokens, self.shape.hidden)
        if kind not in ("moe", "mtp"):
            return PassedBytes(0, 0 if kind == "embed" else 2 * x if self.recipe.fp8 else x)
        weights, rows = 4 * n * s.top_k, self.in_dtype(self.rows, s.hidden)
        # The residual and the rows of the experts' results; where they are recomputed, their input and choices.
        forward = x + rows + weights
        forward += x if self.recomputed("norm") or self.recomputed("layer") else 0
        forward += 8 * n * s.top_k if self.recomputed("layer") else 0
        # Gradients of the experts' input by row and by token, of the weights of rows and of choices.
        backward = rows + x + 4 * self.rows + weights + self._given_to_experts()
        ends = 2 if kind == "mtp" else 1  # inputs of norms: the layer's, and its head's
        return PassedBytes(forward, backward + ends * x + (x if self.recipe.fp8 or not s.shared else 0))

    # -- parts

    def _given_to_experts(self) -> int:
        """What the backward of experts in FP8 was given and does not keep for weight gradients."""
        if self.recipe.fp8_dispatch:
            return self.in_fp8(self.rows, 2 * self.shape.expert_ffn)
        return 2 * self.in_dtype(self.rows, self.shape.hidden) if self.recipe.fp8 else 0

    def _linears(self, rows: int, *outputs: int) -> int:
        """Gradients of the outputs of Linears of the recipe, as their weight gradients read them."""
        return sum(self.in_fp8(width, rows) if self.recipe.fp8 else self.in_dtype(rows, width) for width in outputs)

    def _tokens(self) -> int:
        """A copy where sequences are cut out of longer ones; one sequence alone is a view."""
        return 8 * self.size.tokens if self.size.sequences > 1 else 0

    def _operand(self, rows: int, width: int) -> int:
        """What a Linear of the recipe keeps of its normed input."""
        if self.recomputed("norm"):
            return 0
        return self.in_fp8(rows, width) if self.recipe.fp8 else self.in_dtype(rows, width)

    def _norm(self, phase: str, what: str, width: int, linear: str, plain: str = "") -> Iterator[Row]:
        """A norm's input, and its output as kept by a `linear` of the recipe and by a `plain` one in run.dtype."""
        n = self.size.tokens
        yield phase, f"{what}, 1 / rms", "norm", self.in_dtype(n, width) + 4 * n
        if linear:
            yield phase, f"{what}, normed", linear, self._operand(n, width)
        # In BF16 both readers keep one and the same tensor.
        if plain and (self.recipe.fp8 or not linear):
            yield phase, f"{what}, normed", plain, 0 if self.recomputed("norm") else self.in_dtype(n, width)

    def _attention(self, phase: str) -> Iterator[Row]:
        s, n = self.shape, self.size.tokens
        yield from self._norm(phase, "x", s.hidden, "q, kv_a" if s.q_lora is None else "q_a, kv_a")
        if s.q_lora is not None:
            yield from self._norm(phase, "query latent", s.q_lora, "q_b")
        yield phase, "key-value latent, rope key, 1 / rms", "norm", self.in_dtype(n, s.kv_lora + s.rope_dim) + 4 * n
        yield phase, "key-value latent, normed", "kv_b", self._operand(n, s.kv_lora)
        yield from self._core(phase)

    def _core(self, phase: str) -> Iterator[Row]:
        s, n, cuda = self.shape, self.size.tokens * self.size.core, self.size.cuda and not self.size.documents
        if not self.recomputed("mla_up"):
            # On a GPU values are a view of kv_b's output, which stays as a whole, with the keys' part without rope.
            values = s.nope_dim + s.v_dim if cuda else max(s.qk_dim, s.v_dim)
            yield phase, "queries, keys, values", "attention core", self.in_dtype(n, s.heads * (2 * s.qk_dim + values))
        elif s.q_lora is None:
            rows = self.size.tokens
            yield phase, "queries before rope", "attention core, by recompute", self.in_dtype(rows, s.heads * s.qk_dim)
        out = s.v_dim if cuda else max(s.qk_dim, s.v_dim)
        yield phase, "output of the heads", "attention core", self.in_dtype(n, s.heads * out)
        yield phase, "log-sum-exp of scores", "attention core", 4 * n * s.heads
        yield phase, "output of the heads", "o", self._after_attention(out)

    def _after_attention(self, out: int) -> int:
        n, width = self.size.tokens, self.shape.heads * self.shape.v_dim
        # A padded or spread output is cut to its width or tokens; else o reads the core's, which is counted there.
        if not self.recipe.fp8:
            return self.in_dtype(n, width) if out > self.shape.v_dim or self.size.core > 1 else 0
        if out == self.shape.v_dim and not self.size.documents:
            return 0
        if self.recipe.cache_after_attention == "fp8":
            return self.in_fp8(n, width)
        # E5M6: 12 bits an element and an FP32 scale a tile.
        return n * round_up(width, TILE) * 3 // 2 + 4 * round_up(width, TILE) // TILE * round_up(n, 4)

    def _ffn(self, phase: str, reader: str, rows: int, width: int) -> Iterator[Row]:
        if self.recipe.fp8:
            yield phase, "gate and up", reader, self.in_fp8(rows, 2 * width)
            return
        yield phase, "gate and up", reader, self.in_dtype(rows, 2 * width)
        yield phase, "their SwiGLU", reader, 0 if self.recomputed("swiglu") else self.in_dtype(rows, width)

    def _gate(self) -> Iterator[Row]:
        s, n = self.shape, self.size.tokens
        yield "attention", "choices", "gate", 8 * n * s.top_k
        if self.size.cuda:
            yield from self._fused_gate()
            return
        yield "attention", "scores", "gate", 4 * n * s.routed
        if s.normalise:
            yield "attention", "weights and their sums", "gate", 4 * n * (s.top_k + 1)
        if s.balance_alpha:
            yield "attention", "shares of experts, sums", "balance loss", 4 * self.size.sequences * s.routed + 8 * n

    def _fused_gate(self) -> Iterator[Row]:
        s, n = self.shape, self.size.tokens
        if s.sparse_gate:
            yield "attention", "scores of the chosen", "gate", 4 * n * s.top_k
        else:
            yield "attention", "logits", "gate", 4 * n * s.routed
        if s.balance_alpha:
            yield "attention", "tallies of experts", "balance loss", 4 * self.size.sequences * s.routed

    def _experts(self) -> Iterator[Row]:
        s, rows = self.shape, self.rows
        if not self.recipe.fp8_dispatch:
            yield "experts", "arrived rows", "experts", self.in_dtype(rows, s.hidden)
        if self.recipe.fp8:
            yield "experts", "arrived rows in FP8", "experts", self.in_fp8(rows, s.hidden)
        yield "experts", "weights of rows", "SwiGLU", 4 * rows
        yield from self._ffn("experts", "experts", rows, s.expert_ffn)

    def _head(self, depth: int) -> Iterator[Row]:
        s, n = self.shape, self.size.tokens
        yield "head", "x, 1 / rms", "norm", self.in_dtype(n, s.hidden) + 4 * n
        if depth < s.mtp_depth:
            yield "head", "x, normed", "head, norm_h of the next depth", self.in_dtype(n, s.hidden)
        else:
            yield "head", "x, normed", "head", 0 if self.recomputed("norm") else self.in_dtype(n, s.hidden)
        yield "head", "logits", "loss", self.in_dtype(n, s.vocab)
        yield "head", "targets, log-sum-exp", "loss", self._tokens() + 4 * n
