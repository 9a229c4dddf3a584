"""Peak memory of temporaries: tensors that are freed within a block's forward or backward. Torch-free.

The peak is either inside a block's backward, where gradients of its saved tensors are computed, or in the loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from dryvine.trainer.activations import microbatch_size
from dryvine.trainer.fp8.recipe import Recipe
from dryvine.trainer.model.memory import SLICE_ELEMENTS, MicrobatchSize, remade_bytes
from dryvine.trainer.model.shape import Shape, blocks
from dryvine.trainer.run_plan import LayoutPlan


def temporary_bytes(plan: LayoutPlan, stages: Iterable[int], cuda: bool, room: float = 1.0) -> int:
    """Bytes of temporaries of the block with the most, among those of these stages, with room for `room` times the mean
    of experts' rows."""
    config = plan.config
    size, kinds = microbatch_size(config, cuda, room), {block.name: block.kind for block in blocks(config.model)}
    mine = {kinds[name] for stage in stages for name in plan.blocks[stage]}
    loss = 0 if cuda or not mine & {"head", "mtp"} else _in_loss(config.model, size.tokens, size.dtype_bytes)
    return max(loss, *(block_bytes(config.model, config.fp8, kind, size) for kind in mine))


def block_bytes(s: Shape, recipe: Recipe, kind: str, size: MicrobatchSize) -> int:
    """Bytes of the temporaries in the backward of one block."""
    transposed = _transposed(s, kind, size) if recipe.fp8 and "transposes" in s.recompute else 0
    return _in_block(s, kind, size, size.dtype_bytes, transposed) + remade_bytes(s, recipe, kind, size)


def _transposed(s: Shape, kind: str, size: MicrobatchSize) -> int:
    """Bytes of the largest FP8 weight of an FFN, transposed while its dX is computed."""
    experts = 2 * s.expert_ffn * max(s.routed // size.ep, s.shared)
    return s.hidden * {"dense": 2 * s.ffn, "moe": experts, "mtp": experts}.get(kind, 0)


def _in_loss(s: Shape, tokens: int, wide: int) -> int:
    """On a CPU the loss takes logits in slices of at most `SLICE_ELEMENTS`: in place where they are in FP32; else in an
    FP32 copy, beside one that torch's `logsumexp` makes."""
    rows = min(tokens, max(1, SLICE_ELEMENTS // s.vocab))
    return 0 if wide == 4 else 8 * rows * s.vocab


def _in_block(s: Shape, kind: str, size: MicrobatchSize, wide: int, transposed: int) -> int:
    """Bytes of the largest set of gradients that exist at once in the backward of such a block: of gate, up and their
    product in FFNs, with a `transposed` weight, of queries, keys and values in attention."""
    tokens, rows = size.tokens, ceil(size.tokens * s.top_k * size.room)
    attention = tokens * s.heads * (3 * s.qk_dim + 2 * s.v_dim + s.nope_dim)
    ffn = {
        "embed": tokens * s.hidden,
        "dense": 3 * tokens * s.ffn,
        "moe": rows * (3 * s.expert_ffn + s.hidden),
        "head": 2 * tokens * s.hidden,
        "mtp": rows * (3 * s.expert_ffn + s.hidden),
    }[kind]
    most = max(wide * ffn + transposed, wide * attention if kind in ("dense", "moe", "mtp") else 0)
    return most + wide * 2 * tokens * s.hidden
