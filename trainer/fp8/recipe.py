"""The numerics of a run as one value, the `[fp8]` table: a preset and changes to it.

With the alternative, a flag for each decision, read wherever a cast happens, a run can have BF16 wgrads in half its
layers unnoticed. Here a Linear gets its recipe when it is built, and a recipe can be printed. Choices that train worse
(`tensor`, `128x128` for activations, the tensor cores' own accumulator) exist to test that claim. DeepSeek-V3:
arXiv 2412.19437, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from dryvine.trainer.fp8.engines.names import ENGINES
from dryvine.trainer.tensors.tiles import ScaleFormat

Tile = Literal["1x128", "128x128", "tensor"]
Accumulator = Literal["fp32", "hopper"]
Preset = Literal["deepseek_v3", "bf16", "fp32"]


def _known_engine(name: str) -> str:
    """Raises what a Literal of the names would, which a type checker cannot be given."""
    names = ["auto", *ENGINES]
    if name not in names:
        *others, last = map(repr, names)
        raise PydanticCustomError("engine", f"Input should be {', '.join(others)} or {last}")
    return name


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """The defaults are those of the preset `deepseek_v3`; `preset` is applied first, then the other keys."""

    preset: Preset = "bf16"
    # All three products of every Linear. Without FP8 they, and with it embedding, head, gate, norms and attention core,
    # are in run.dtype.
    linear: Literal["fp8", "bf16", "fp32"] = "fp8"
    activation_tile: Tile = "1x128"
    # The operand of Dgrad, and of Wgrad the other way.
    gradient_tile: Tile = "1x128"
    weight_tile: Literal["128x128", "tensor"] = "128x128"
    scales: ScaleFormat = "fp32"
    # Of the emulated products; a GPU has the one it has.
    accumulator: Accumulator = "fp32"
    # With accumulator "hopper": after how much of K sums move to FP32; 0: never.
    promotion: Annotated[int, Field(ge=0, multiple_of=32)] = 128
    # What multiplies: a name of engines/names.py, or "auto", the fastest that works.
    gemm: Annotated[str, AfterValidator(_known_engine)] = "auto"
    # To what the input of the Linear after attention is rounded for its weight gradient.
    cache_after_attention: Literal["fp8", "e5m6"] = "e5m6"
    # Rows sent to experts, and gradients of what experts returned, in 1x128 tiles of power-of-two scales; sums coming
    # back are in run.dtype. "bf16", the default with other tiles: in run.dtype too.
    dispatch: Literal["fp8", "bf16"] = "fp8"
    # Steps between counts of bad and floored tiles; 0: never.
    guard_every: Annotated[int, Field(ge=0)] = 100

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        preset = given.get("preset", "bf16")
        # One that is not known is left for the field to refuse.
        over = (PRESETS[preset] if isinstance(preset, str) and preset in PRESETS else {}) | given
        return over if _in_1x128(over) else {"dispatch": "bf16"} | over

    @model_validator(mode="after")
    def _tiles_travel(self) -> Recipe:
        if self.fp8_dispatch and not _in_1x128(self.model_dump()):
            raise ValueError("fp8.dispatch = 'fp8' carries 1x128 tiles and no other; set fp8.dispatch = 'bf16'")
        return self

    @property
    def fp8(self) -> bool:
        return self.linear == "fp8"

    @property
    def fp8_dispatch(self) -> bool:
        return self.fp8 and self.dispatch == "fp8"


def _in_1x128(given: Mapping[str, object]) -> bool:
    return all(given.get(tile, "1x128") == "1x128" for tile in ("activation_tile", "gradient_tile"))


PRESETS: dict[Preset, dict[str, object]] = {
    "deepseek_v3": {},
    "bf16": {"linear": "bf16"},
    "fp32": {"linear": "fp32"},
}


def preset(name: Preset, **changes: object) -> Recipe:
    """A preset with some fields changed."""
    return Recipe.model_validate({"preset": name, **changes})
