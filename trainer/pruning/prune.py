"""A model of fewer experts: the most used of each layer stay; the others are dropped, or merged into those most alike.

Merged experts are means weighted by load (arXiv 2310.01334), after the hidden units of one are put in the order of the
other's: an FFN does not care about the order of its units, and a mean does. Every layer keeps the same number, which is
what a [model] table can say. Groups of experts are given up, as those that stay are no longer as many in each: the gate
chooses among all. What either costs is for `dryvine eval` to say.

Legend: X experts of a layer, Y of them stay, H hidden, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from dryvine.trainer.checkpoint.run_folder import newest
from dryvine.trainer.checkpoint.stored import write_pieces
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.names import sizes
from dryvine.trainer.hand_off.run_files import write_shape
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.experts import Experts
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.pruning.measure import ExpertUse


class LayerChoice(NamedTuple):
    """`kept`: experts that stay, in their order; `into`: the one that each dropped expert is merged into, by number;
    `lost`: share of choices that fell on dropped ones."""

    kept: list[int]
    into: dict[int, int]
    lost: float


def fewer(shape: Shape, keep: int) -> Shape:
    """Raises HandOffError if no model has so few."""
    if not shape.top_k <= keep <= shape.routed:
        raise HandOffError(f"--keep {keep}: a number from {shape.top_k}, which a token chooses, to {shape.routed}")
    changes = {"routed": keep, "groups": 1, "group_limit": 1}
    try:
        return Shape.model_validate(shape.model_dump() | changes)
    except ValidationError as error:
        raise HandOffError(f"--keep {keep}: {str(error).splitlines()[-1].strip()}") from None


def choose(use: ExpertUse, keep: int, merge: bool) -> LayerChoice:
    """By load, and of equal ones the first."""
    order: list[int] = use.load.argsort(descending=True, stable=True).tolist()
    kept, dropped = sorted(order[:keep]), order[keep:]
    lost = float(use.load[dropped].sum() / use.load.sum().clamp_min(1))
    alike = use.similarity() if merge and dropped else None
    into = {} if alike is None else {x: kept[int(alike[x, kept].argmax())] for x in dropped}
    return LayerChoice(kept, into, lost)


@torch.no_grad()
def experts_of(use: ExpertUse, choice: LayerChoice) -> tuple[Tensor, Tensor]:
    """gate_up [Y, 2F, H] and down [Y, H, F] of those that stay, with what is merged into them."""
    made = [_merged(use, kept, [x for x, into in choice.into.items() if into == kept]) for kept in choice.kept]
    gate_up, down = zip(*made, strict=True)
    return torch.stack(gate_up), torch.stack(down)


def _merged(use: ExpertUse, kept: int, others: list[int]) -> tuple[Tensor, Tensor]:
    units = _units(use.experts, kept)
    # An expert that nobody chose still stands for itself.
    total, weight = units * (own := float(use.load[kept].clamp_min(1))), own
    for other in others:
        load = float(use.load[other])
        total, weight = total + load * aligned(_units(use.experts, other), units), weight + load
    gate, up, down = (total / weight).unflatten(1, (3, -1)).unbind(1)
    return torch.cat((gate, up)), down.t()


def _units(experts: Experts, number: int) -> Tensor:
    """[F, 3H], FP32: of each hidden unit, its rows of gate and up and its column of down."""
    gate, up = experts.gate_up[number].detach().float().chunk(2)
    return torch.cat((gate, up, experts.down[number].detach().float().t()), 1)


def aligned(units: Tensor, like: Tensor) -> Tensor:
    """Units in the order in which each is most like one of `like`; the most alike pairs first, greedily."""
    alike = functional.normalize(like, dim=1) @ functional.normalize(units, dim=1).t()
    order = torch.empty(len(units), dtype=torch.int64)
    for _ in range(len(units)):
        row, column = divmod(int(alike.argmax()), len(units))
        order[row] = column
        alike[row], alike[:, column] = -torch.inf, -torch.inf
    return units[order]


def write_pruned(model: Model, uses: Mapping[str, ExpertUse], choices: Mapping[str, LayerChoice], out: Path) -> Path:
    """Checkpoint 0 of the run folder `out`, and its model.toml. Raises HandOffError."""
    if newest(out) is not None:
        raise HandOffError(f"{out}: has checkpoints already; name a new run folder with --out")
    shape = fewer(model.spec.shape, len(next(iter(choices.values())).kept))
    state = {name: weight.detach().float() for name, weight in model.named_parameters()} | model.buffers
    for name, choice in choices.items():
        state[f"{name}.experts.gate_up"], state[f"{name}.experts.down"] = experts_of(uses[name], choice)
        for part in ("weight", "bias"):
            state[f"{name}.gate.{part}"] = state[f"{name}.gate.{part}"][choice.kept]
    shapes = sizes(shape)
    pieces = ((name, 0, {"master": state[name].flatten()}) for name in shapes)
    biases = {name: tensor for name, tensor in state.items() if name in model.buffers}
    out.mkdir(parents=True, exist_ok=True)
    path = write_pieces(out, 0, pieces, biases, shapes)
    write_shape(out, shape)
    return path
