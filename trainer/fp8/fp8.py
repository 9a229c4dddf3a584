"""What all FP8 modules of one rank share: recipe, engine, weight cache, guard, and the casts of the recipe.

The three products of a weight (arXiv 2412.19437, figure 6):

    Fprop  y  = x Wᵀ     x by rows (1x128), W by blocks
    Dgrad  dx = dy W     dy by rows, the transposed copy of W
    Wgrad  dW += dyᵀ x   both by columns (128x1): tiles run along the tokens that are summed over

x is saved for the backward as FP8 rows, which are transposed and quantised again for Wgrad, as in V3: half of BF16's
memory. The attention core keeps its output in BF16 for its own backward, so the Linear behind it saves that, and rounds
it to E5M6 when dW runs: a copy in E5M6, made in the forward, would have the same bits and three quarters more memory.
linear.py and ffn.py are the autograd functions.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dryvine.trainer.fp8 import casts
from dryvine.trainer.fp8.coarse import quantize_coarse
from dryvine.trainer.fp8.engines.protocol import Products
from dryvine.trainer.fp8.guard import Guard
from dryvine.trainer.fp8.recipe import Recipe
from dryvine.trainer.fp8.weights import WeightCache
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import E5M6, Quantized
from dryvine.trainer.tensors.weight import Weight

Operand = Callable[[], Quantized]  # of Wgrad: computed when dW runs, so that its cast is deferred too
Saved = Quantized | E5M6 | Tensor  # of a Linear's input; a Tensor is the attention core's output, which the core keeps


class FP8:
    """The FP8 arithmetic of one rank, built once and passed to its modules. `chosen`: which engine is used and why, for
    the log. `transposes`: as of `WeightCache`."""

    def __init__(self, recipe: Recipe, engine: Products, chosen: str, transposes: bool = True) -> None:
        self.recipe, self.engine, self.chosen = recipe, engine, chosen
        self.cache, self.guard = WeightCache(recipe, transposes), Guard()
        self._all_rows: dict[int, ExpertGroups] = {}

    def all_rows(self, x: Tensor) -> ExpertGroups:
        """The rows of x as one group. Cached by their number, since its tables are on the device."""
        if len(x) not in self._all_rows:
            groups = self._all_rows[len(x)] = ExpertGroups.of([len(x)], x)
            # Copied now, on the compute stream, for which all others wait.
            _ = groups.tables
        return self._all_rows[len(x)]

    def rows(self, x: Tensor) -> Quantized:
        """x [R, C] as an operand of Fprop."""
        x = x.detach().contiguous()
        if self.recipe.activation_tile == "1x128":
            return casts.quantize_rows(x, self.recipe.scales)
        return quantize_coarse(x, self.recipe.activation_tile, self.recipe.scales)

    def after_attention(self, x: Tensor) -> Quantized | E5M6:
        """The input [R, C] of the Linear after attention, as Wgrad reads it."""
        if self.recipe.cache_after_attention == "fp8":
            return self.rows(x)
        return casts.pack_e5m6(x.detach().contiguous())

    def columns(self, saved: Saved, groups: ExpertGroups, width: int | None = None) -> Quantized:
        """What was saved as an operand of Wgrad. The columns of E5M6 beyond `width` are padding."""
        if isinstance(saved, Tensor):
            saved = self.after_attention(saved)
        if isinstance(saved, E5M6):
            x = casts.unpack_e5m6(saved)[:, :width].contiguous()
            return casts.quantize_columns(x, groups, self.recipe.scales)
        return casts.quantize_columns(saved, groups, self.recipe.scales)

    def gradient(self, dy: Tensor, groups: ExpertGroups) -> tuple[Quantized, Quantized]:
        """dy as an operand of Dgrad and of Wgrad."""
        dy, scales, tile = dy.contiguous(), self.recipe.scales, self.recipe.gradient_tile
        if tile == "1x128":
            return casts.quantize_both(dy, groups, scales)
        transposed = casts.padded(dy.float(), groups).t().contiguous()
        return quantize_coarse(dy, tile, scales), quantize_coarse(transposed, tile, scales)

    def defer_wgrad(self, weight: Weight, dy: Operand, x: Operand, groups: ExpertGroups) -> None:
        """Defer dW += dyᵀ x, both operands by columns."""

        def run() -> None:
            total = weight.gradient()
            self.engine.wgrad(dy(), x(), groups, total if total.dim() == 3 else total.unsqueeze(0))

        weight.defer(run)
