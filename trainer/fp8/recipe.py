"""The numerics of a run as one value: the `[fp8]` table. A preset and what one changes of it.

The alternative, a flag per decision read wherever a cast happens, is how a run ends up with BF16 wgrads for half its
layers and nobody knows. Here a Linear gets its recipe when it is built, and a recipe can be printed. The choices that
make training worse (`tensor`, `128x128` for activations, the tensor cores' own accumulator) are here because a claim
that they are worse must be testable. DeepSeek-V3: arXiv 2412.19437, section 3.3.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

Tile = Literal["1x128", "128x128", "tensor"]
Scales = Literal["fp32", "ue8m0"]


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """Defaults are those of the preset `deepseek_v3`; `preset` is applied first, the other keys over it."""

    preset: Literal["deepseek_v3", "bf16", "fp32"] = "bf16"
    linear: Literal["fp8", "bf16", "fp32"] = "fp8"  # all three products of every Linear; without FP8 they, and with it
    # embedding, head, gate, norms and attention core, are in run.dtype
    activation_tile: Tile = "1x128"
    gradient_tile: Tile = "1x128"  # the operand of Dgrad, and of Wgrad the other way
    weight_tile: Literal["128x128", "tensor"] = "128x128"
    scales: Scales = "fp32"
    accumulator: Literal["fp32", "hopper"] = "fp32"  # of the emulated products; a GPU has the one it has
    promotion: Annotated[int, Field(ge=0, multiple_of=32)] = 128  # of K, with accumulator "hopper"; 0: never
    gemm: Literal["auto", "emulate", "torch", "triton", "deep_gemm", "transformer_engine"] = "auto"
    cache_after_attention: Literal["fp8", "e5m6"] = "e5m6"  # the saved input of the Linear after attention
    dispatch: Literal["fp8", "bf16"] = "fp8"  # rows sent to experts, and gradients of what they gave, in 1x128 tiles of
    # power-of-two scales; sums coming back are in run.dtype. "bf16", the default with other tiles: in run.dtype too
    guard_every: Annotated[int, Field(ge=0)] = 100  # steps between counts of bad and floored tiles; 0: never

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known: dict[str, Any] = PRESETS.get(given.get("preset", "bf16"), {}) | given
        return known if _fine(known) else {"dispatch": "bf16"} | known

    @model_validator(mode="after")
    def _tiles_travel(self) -> Recipe:
        if self.fp8_dispatch and not _fine(self.model_dump()):
            raise ValueError("fp8.dispatch = 'fp8' carries 1x128 tiles and no other; set fp8.dispatch = 'bf16'")
        return self

    @property
    def fp8(self) -> bool:
        return self.linear == "fp8"

    @property
    def fp8_dispatch(self) -> bool:
        return self.fp8 and self.dispatch == "fp8"


def _fine(given: dict[str, Any]) -> bool:
    return all(given.get(tile, "1x128") == "1x128" for tile in ("activation_tile", "gradient_tile"))


PRESETS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"preset": "deepseek_v3"},
    "bf16": {"preset": "bf16", "linear": "bf16"},
    "fp32": {"preset": "fp32", "linear": "fp32"},
}


def preset(name: Literal["deepseek_v3", "bf16", "fp32"], **changes: Any) -> Recipe:
    """A preset with some fields changed."""
    return Recipe(preset=name, **changes)
