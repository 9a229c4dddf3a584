"""The arithmetic of every block, kernel by kernel: how much each of F, I and W does, before any machine is named.

A product of a Linear is one task of F, one of I and one of W, equally large; the attention core has no W and a larger
I; what moves bytes and multiplies nothing is a task of the kernel "stream", in bytes. A test holds the sum of F against
`shape.blocks`, which the partition uses. Counting kernels of a traced step instead would need the GPU.

Legend: N tokens of a microbatch, R rows of this rank's experts (N top-k, when all experts are chosen equally often).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from dryvine.trainer.fp8.recipe import Recipe
from dryvine.trainer.model.memory import MicrobatchSize, remade_phases
from dryvine.trainer.model.shape import Shape

STREAM = "stream"


class Task(NamedTuple):
    """Work of one kernel in one phase of a block: FLOP, or bytes of memory traffic if `kernel` is STREAM."""

    phase: str  # attention | experts | head | dense | embed
    kernel: str  # a field of KernelRates, or STREAM
    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0


def tasks(shape: Shape, recipe: Recipe, kind: str, size: MicrobatchSize, seq_len: int) -> list[Task]:
    """The tasks of one block of that kind for one microbatch."""
    block = _Block(shape, recipe, size, seq_len)
    makers = {"embed": block.embed, "dense": block.dense, "moe": block.moe, "head": block.head, "mtp": block.mtp}
    again = remade_phases(shape, recipe)
    return [t._replace(inputs=t.inputs + t.forward) if t.phase in again else t for t in makers[kind]()]


@dataclass(frozen=True)
class _Block:
    shape: Shape
    recipe: Recipe
    size: MicrobatchSize
    seq_len: int

    @property
    def tokens(self) -> int:
        return self.size.tokens

    @property
    def rows(self) -> int:
        return self.size.tokens * self.shape.top_k

    @property
    def experts(self) -> int:
        """Of this rank."""
        return self.shape.routed // self.size.ep

    # -- blocks

    def embed(self) -> Iterator[Task]:
        hidden = self._bytes(self.tokens, self.shape.hidden)
        yield Task("embed", STREAM, 2 * hidden, 0, 3 * hidden)

    def dense(self) -> Iterator[Task]:
        yield from self._attention("dense")
        yield from self._ffn("dense", self.tokens, self.shape.ffn)

    def moe(self) -> Iterator[Task]:
        s, n = self.shape, self.tokens
        yield from self._attention("attention")
        if s.shared:
            yield from self._ffn("attention", n, s.shared * s.expert_ffn)
        yield from self._plain("attention", n, s.hidden, s.routed)
        yield from self._ffn("experts", self.rows, s.expert_ffn, "_grouped")
        # Rows into the experts' order, and a token's rows summed: read and written once each, both ways.
        moved = 2 * self._bytes(self.rows, s.hidden) + 2 * self._sent(self.rows, s.hidden)
        yield Task("experts", STREAM, moved, moved)

    def head(self) -> Iterator[Task]:
        s, n = self.shape, self.tokens
        yield self._norm("head", s.hidden, cast=False)
        yield from self._plain("head", n, s.hidden, s.vocab)
        logits = self._bytes(n, s.vocab)
        yield Task("head", STREAM, logits, 2 * logits)

    def mtp(self) -> Iterator[Task]:
        s, n = self.shape, self.tokens
        # Of both, one after the other, the Linear behind makes a cast, again where they are recomputed.
        yield from (self._norm("attention", s.hidden) for _ in range(2))
        yield from self._product("attention", n, 2 * s.hidden, s.hidden)
        yield from self.moe()
        yield from self.head()

    # -- parts

    def _attention(self, phase: str) -> Iterator[Task]:
        s, n = self.shape, self.tokens
        q_out, kv_out = s.heads * s.qk_dim, s.heads * (s.nope_dim + s.v_dim)
        yield self._norm(phase, s.hidden)
        if s.q_lora is None:
            yield from self._product(phase, n, s.hidden, q_out)
        else:
            yield from self._product(phase, n, s.hidden, s.q_lora)
            yield self._norm(phase, s.q_lora)
            yield from self._product(phase, n, s.q_lora, q_out)
        yield from self._product(phase, n, s.hidden, s.kv_lora + s.rope_dim)
        yield self._norm(phase, s.kv_lora)
        yield from self._product(phase, n, s.kv_lora, kv_out)
        yield from self._product(phase, n, s.heads * s.v_dim, s.hidden)
        yield from self._core(phase)
        yield self._norm(phase, s.hidden)
        residual = 3 * self._bytes(n, s.hidden)
        yield Task(phase, STREAM, 2 * residual, 2 * residual)

    def _core(self, phase: str) -> Iterator[Task]:
        """The attention core: half of the scores and values, causal. Backward: the scores again, and four more
        products."""
        s, n = self.shape, self.tokens
        half = float(n * self.seq_len * s.heads)
        yield Task(phase, "attention", forward=half * (s.qk_dim + s.v_dim))
        yield Task(phase, "attention_backward", inputs=half * (3 * s.qk_dim + 2 * s.v_dim))
        # Queries are turned in place, keys and values assembled; gradients are taken apart (docs/model.md, "Kernels").
        assembled = self._bytes(n, s.heads * (s.nope_dim + s.qk_dim + 2 * s.rope_dim))
        apart = self._bytes(n, s.heads * (3 * s.qk_dim + 2 * s.v_dim + s.nope_dim))
        again = "mla_up" in s.recompute
        yield Task(phase, STREAM, assembled, apart + (assembled if again else 0))
        if again:
            up = 2.0 * n * s.kv_lora * s.heads * (s.nope_dim + s.v_dim)
            queries = 0.0 if s.q_lora is None else 2.0 * n * s.q_lora * s.heads * s.qk_dim
            yield Task(phase, self._kernel(""), inputs=up + queries)

    def _ffn(self, phase: str, rows: int, width: int, grouped: str = "") -> Iterator[Task]:
        s = self.shape
        yield from self._product(phase, rows, s.hidden, 2 * width, grouped)
        yield from self._product(phase, rows, width, s.hidden, grouped)
        swiglu = self._bytes(rows, 3 * width)
        again = swiglu if "swiglu" in s.recompute else 0.0
        yield Task(phase, STREAM, swiglu, self._bytes(rows, 5 * width) + again)

    def _product(self, phase: str, rows: int, inputs: int, outputs: int, grouped: str = "") -> Iterator[Task]:
        """A Linear in the recipe's format."""
        flop = 2.0 * rows * inputs * outputs
        yield Task(phase, self._kernel(grouped), flop, flop)
        yield Task(phase, "fp8_wgrad" if self.recipe.fp8 else self._kernel(grouped), weights=flop)
        if self.recipe.fp8 and "transposes" in self.shape.recompute:
            # A byte an element, read and written.
            yield Task(phase, STREAM, inputs=2.0 * inputs * outputs * (self.experts if grouped else 1))

    def _plain(self, phase: str, rows: int, inputs: int, outputs: int) -> Iterator[Task]:
        """A Linear that stays in the run's dtype: gate and head."""
        flop = 2.0 * rows * inputs * outputs
        yield Task(phase, self._in_run_dtype(""), flop, flop, flop)

    def _norm(self, phase: str, width: int, cast: bool = True) -> Task:
        """Its weight's gradient is summed over tokens in I. `cast`: Linears of the recipe read it, in FP8 its cast."""
        one = self._bytes(self.tokens, width)
        again = 2 * one + (self.tokens * width if cast and self.recipe.fp8 else 0)
        return Task(phase, STREAM, 2 * one, 5 * one + (again if "norm" in self.shape.recompute else 0))

    def _kernel(self, grouped: str) -> str:
        return f"fp8{grouped}" if self.recipe.fp8 else self._in_run_dtype(grouped)

    def _in_run_dtype(self, grouped: str) -> str:
        return "fp32" if self.size.dtype_bytes == 4 else f"bf16{grouped}"

    def _bytes(self, rows: int, width: int) -> float:
        """Bytes of rows in run.dtype."""
        return float(rows * width * self.size.dtype_bytes)

    def _sent(self, rows: int, width: int) -> float:
        return float(rows * width) if self.recipe.fp8_dispatch else self._bytes(rows, width)
