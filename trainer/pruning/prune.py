"""A model with fewer experts: the most used ones of each layer are kept; the others are dropped, or merged into the
most similar ones.

Merged experts are means weighted by load (arXiv 2310.01334), after one expert's hidden units are permuted to match the
other's: an FFN does not depend on the order of its units, but a mean does. Every layer keeps the same number of
experts, since a [model] table has one number for all. Expert groups are removed, as the kept experts no longer fill
them equally: the gate chooses among all. `dryvine eval` measures what either costs.

Legend: X experts of a layer, Y of them kept, H hidden, F width of an expert.
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
from dryvine.trainer.data.atomic import CannotWrite
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.names import sizes
from dryvine.trainer.hand_off.run_files import write_shape
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.experts import Experts
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.pruning.measure import ExpertUse


class LayerChoice(NamedTuple):
    """`kept`: the experts that are kept, in order; `into`: the kept expert that each dropped one is merged into;
    `lost`: share of routed tokens that went to dropped ones."""

    kept: list[int]
    into: dict[int, int]
    lost: float


def fewer(shape: Shape, keep: int) -> Shape:
    """The shape with `keep` experts a layer. Raises HandOffError if no model can have so few."""
    if not shape.top_k <= keep <= shape.routed:
        raise HandOffError(f"--keep {keep}: a number from {shape.top_k}, which a token chooses, to {shape.routed}")
    changes = {"routed": keep, "groups": 1, "group_limit": 1}
    try:
        return Shape.model_validate(shape.model_dump() | changes)
    except ValidationError as error:
        raise HandOffError(f"--keep {keep}: {str(error).splitlines()[-1].strip()}") from None


def choose(use: ExpertUse, keep: int, merge: bool) -> LayerChoice:
    """The experts to keep: by load, and the first of equal ones."""
    order: list[int] = use.load.argsort(descending=True, stable=True).tolist()
    kept, dropped = sorted(order[:keep]), order[keep:]
    lost = float(use.load[dropped].sum() / use.load.sum().clamp_min(1))
    alike = use.similarity() if merge and dropped else None
    into = {} if alike is None else {x: kept[int(alike[x, kept].argmax())] for x in dropped}
    return LayerChoice(kept, into, lost)


@torch.no_grad()
def experts_of(use: ExpertUse, choice: LayerChoice) -> tuple[Tensor, Tensor]:
    """gate_up [Y, 2F, H] and down [Y, H, F] of the kept experts, with the others merged into them if `choice` says
    so."""
    made = [_merged(use, kept, [x for x, into in choice.into.items() if into == kept]) for kept in choice.kept]
    gate_up, down = zip(*made, strict=True)
    return torch.stack(gate_up), torch.stack(down)


def _merged(use: ExpertUse, kept: int, others: list[int]) -> tuple[Tensor, Tensor]:
    units = _units(use.experts, kept)
    # An expert without tokens still has weight in its own mean.
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
    """`units` permuted so that each is matched with the most similar one of `like`: greedily, the most similar pairs
    first."""
    alike = functional.normalize(like, dim=1) @ functional.normalize(units, dim=1).t()
    order = torch.empty(len(units), dtype=torch.int64)
    for _ in range(len(units)):
        row, column = divmod(int(alike.argmax()), len(units))
        order[row] = column
        alike[row], alike[:, column] = -torch.inf, -torch.inf
    return units[order]


def write_pruned(model: Model, uses: Mapping[str, ExpertUse], choices: Mapping[str, LayerChoice], out: Path) -> Path:
    """Write checkpoint 0 of the run folder `out`, and its model.toml. Raises HandOffError and
    CannotWrite."""
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
    with CannotWrite.naming(out):
        path = write_pieces(out, 0, pieces, biases, shapes)
    write_shape(out, shape)
    return path
