"""A model of ours in transformers, in memory: what peers of the benchmarks run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dryvine.trainer.hand_off.hf_config import config_json
from dryvine.trainer.hand_off.names import places
from dryvine.trainer.model.decoder import Model

if TYPE_CHECKING:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM


class UnknownExperts(Exception):
    """The installed transformers has no such implementation of experts, or not for this torch."""


def as_transformers(model: Model, implementation: str) -> DeepseekV3ForCausalLM:
    """The same weights, in the same dtype and place. `implementation`: how it multiplies with experts. Raises
    UnknownExperts."""
    from transformers import DeepseekV3Config

    shape, own = model.spec.shape, dict(model.named_parameters()) | model.buffers
    config = DeepseekV3Config(**config_json(shape))
    config._experts_implementation = implementation
    with torch.device(model.spec.device):
        other = _made(config).to(model.spec.dtype)
    fused = dict(other.named_parameters()) | dict(other.named_buffers())
    with torch.no_grad():
        for place in places(shape):
            values = own[place.ours].flatten()[place.first : place.first + place.elements].view(place.shape)
            _put(fused, place.theirs, values.detach())
    return other


def _made(config: DeepseekV3Config) -> DeepseekV3ForCausalLM:
    from transformers import DeepseekV3ForCausalLM

    try:
        return DeepseekV3ForCausalLM(config)
    except (ValueError, ImportError) as error:
        raise UnknownExperts(str(error)) from None


def _put(fused: dict[str, Tensor], name: str, values: Tensor) -> None:
    """Experts are stacked there in memory, gate over up."""
    if ".experts." not in name:
        fused[name].copy_(values)
        return
    prefix, rest = name.split(".experts.")
    expert, kind = int(rest.split(".")[0]), rest.split(".")[1]
    if kind == "down_proj":
        fused[f"{prefix}.experts.down_proj"][expert].copy_(values)
        return
    half = fused[f"{prefix}.experts.gate_up_proj"][expert].view(2, *values.shape)
    half[0 if kind == "gate_proj" else 1].copy_(values)
