"""A pipeline stage for decoding: the blocks of a training stage, each with its cache, and the embedding and head.

Legend: N tokens, S sequences, H hidden, V vocabulary, K choices.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from dryvine.parallel.stage import Stage
from dryvine.trainer.generate.cache import Cache
from dryvine.trainer.generate.experts import dispatched, in_memory
from dryvine.trainer.generate.feed import Feed
from dryvine.trainer.generate.layers import CachedDense, CachedMixture, ToExperts, multiply, normed
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.layer import DenseLayer, MoELayer
from dryvine.trainer.model.spec import Spec

_TO_EXPERTS = ("routing", "dispatch", "experts", "combine")  # phases


class CachedStage:
    """Stage `number` of a rank's model, without MTP and losses."""

    def __init__(self, model: Model, stage: Stage, experts: Mapping[str, ToExperts]) -> None:
        """`experts`: how rows reach those of a layer, if not by the run's own phases or in memory."""
        names = list(dict.fromkeys(phase.layer for phase in stage.phases))
        modules = {name: model.root.get_submodule(name) for name in names if name.startswith("layers.")}
        self.spec = model.spec
        self.blocks: list[CachedDense | CachedMixture] = []
        self.mixtures: list[int] = []  # their numbers among all mixtures of the model
        for name, module in modules.items():
            if isinstance(module, DenseLayer):
                self.blocks.append(CachedDense(module))
            elif isinstance(module, MoELayer):
                to_experts = experts.get(name) or _to_experts(model.spec, stage, name, module)
                self.blocks.append(CachedMixture(module, to_experts))
                self.mixtures.append(int(name.removeprefix("layers.")) - model.spec.shape.first_dense)
        parameters = dict(model.named_parameters())
        self.table = parameters["embed.weight"].detach() if "embed" in names else None
        self._head = None
        if "head" in names:
            norm, project = model.root.get_submodule("norm"), model.root.get_submodule("head")
            self._head = (normed(norm), multiply(project))  # type: ignore[arg-type]

    def cache(self) -> Cache:
        """An empty cache for the blocks of this stage."""
        s, like = self.spec.shape, torch.empty(0, dtype=self.spec.dtype, device=self.spec.device)
        return Cache((len(self.blocks), len(self.mixtures)), (s.kv_lora + s.rope_dim, s.top_k), like)

    def __call__(self, x_NH: Tensor | None, feed: Feed, cache: Cache) -> Tensor:
        """The state that the stage before left, None before the first -> the state after this one."""
        if x_NH is None:
            assert self.table is not None
            x_NH = functional.embedding(feed.tokens, self.table)
        chosen = []
        for block, latents in zip(self.blocks, cache.latents, strict=True):
            x_NH, experts_NK = block(x_NH, feed, latents)
            if experts_NK is not None:
                chosen.append(experts_NK)
        if chosen:
            cache.routes[:, feed.slots, feed.positions] = torch.stack(chosen).to(torch.int16)
        return x_NH

    def logits(self, x_SH: Tensor) -> Tensor:
        """FP32 [S, V], of the last stage's states."""
        assert self._head is not None
        norm, project = self._head
        return project(norm(x_SH)).float()


def _to_experts(spec: Spec, stage: Stage, name: str, layer: MoELayer) -> ToExperts:
    if spec.ep_size == 1 and spec.fp8 is None and layer.experts.gate_up.device.type == "cpu":
        return in_memory(layer.experts)
    return dispatched([phase for phase in stage.phases if phase.layer == name and phase.name in _TO_EXPERTS])
