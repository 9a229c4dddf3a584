"""A pipeline stage for decoding: the blocks of a training stage, each with its cache, and the embedding and head.

Legend: N tokens, S sequences, H hidden, V vocabulary, K choices.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from dryvine.comm.pending import Pending
from dryvine.parallel.stage import Stage
from dryvine.trainer.generate.cache import Cache
from dryvine.trainer.generate.experts import dispatched, in_memory
from dryvine.trainer.generate.feed import Feed, LaneStep
from dryvine.trainer.generate.layers import CachedDense, CachedMixture, Multiply, ToExperts, multiply, normed
from dryvine.trainer.generate.sampling import Drawn, sample
from dryvine.trainer.generate.speculate import CachedDepth, Sampled, Speculator
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.layer import DenseLayer, MoELayer
from dryvine.trainer.model.mtp import MTP
from dryvine.trainer.model.spec import Spec

_TO_EXPERTS = ("routing", "dispatch", "experts", "combine")  # phases


class CachedStage:
    """A stage of a rank's model, without losses, and without MTP unless it speculates."""

    def __init__(self, model: Model, stage: Stage, experts: Mapping[str, ToExperts], speculate: bool) -> None:
        """`experts`: how rows reach those of a layer, if not by the run's own phases or in memory."""
        names = list(dict.fromkeys(phase.layer for phase in stage.phases))
        kinds = ("layers.", "mtp.") if speculate else ("layers.",)
        modules = {name: model.root.get_submodule(name) for name in names if name.startswith(kinds)}
        self.spec = model.spec
        self.blocks: list[CachedDense | CachedMixture] = []
        self.mixtures: list[int] = []  # their numbers among all mixtures of the model
        depths: list[CachedDepth] = []
        for name, module in modules.items():
            if isinstance(module, DenseLayer):
                self.blocks.append(CachedDense(module))
            elif isinstance(module, MTP):
                to_experts = experts.get(name) or _to_experts(model.spec, stage, name, module.layer)
                depths.append(CachedDepth(module, to_experts))
            elif isinstance(module, MoELayer):
                to_experts = experts.get(name) or _to_experts(model.spec, stage, name, module)
                self.blocks.append(CachedMixture(module, to_experts))
                self.mixtures.append(int(name.removeprefix("layers.")) - model.spec.shape.first_dense)
        parameters = dict(model.named_parameters())
        self.table = parameters["embed.weight"].detach() if "embed" in names else None
        self._head = _head(model) if "head" in names else None
        self._speculator = None
        if depths and self._head is not None:
            self._speculator = Speculator(depths, parameters["embed.weight"].detach(), self._head[1])

    @property
    def cached_layers(self) -> int:
        """Rows of latents that a token has here: of blocks, then of MTP's depths."""
        return len(self.blocks) + (len(self._speculator.depths) if self._speculator else 0)

    @property
    def whole(self) -> bool:
        """Whether this stage is the whole model."""
        return self.table is not None and self._head is not None

    def cache(self) -> Cache:
        """An empty cache for the layers of this stage."""
        s, like = self.spec.shape, torch.empty(0, dtype=self.spec.dtype, device=self.spec.device)
        return Cache((self.cached_layers, len(self.mixtures)), (s.kv_lora + s.rope_dim, s.top_k), like)

    def __call__(self, x_NH: Tensor | None, feed: Feed, cache: Cache) -> Tensor:
        """The state that the stage before left, None before the first -> the state after this one."""
        if x_NH is None:
            assert self.table is not None
            x_NH = functional.embedding(feed.tokens, self.table)
        chosen = []
        for block, latents in zip(self.blocks, cache.latents, strict=False):
            x_NH, experts_NK = block(x_NH, feed, latents)
            if experts_NK is not None:
                chosen.append(experts_NK)
        if chosen:
            cache.routes[:, feed.slots, feed.positions] = torch.stack(chosen).to(torch.int16)
        return x_NH

    def logits(self, x_NH: Tensor) -> Tensor:
        """FP32 [N, V], of the last stage's states."""
        assert self._head is not None
        norm, logits = self._head
        return logits(norm(x_NH))

    def read(self, x_NH: Tensor, feed: Feed, cache: Cache) -> None:
        """Let MTP read a prompt, if this stage speculates: states of its last block."""
        if self._head is not None and self._speculator is not None:
            self._speculator.read(self._head[0](x_NH), feed, cache.latents[len(self.blocks) :])

    def draw(self, x_NH: Tensor, feed: Feed, cache: Cache, step: LaneStep) -> Pending[Drawn]:
        """Sample after every token of a step, and guess what comes then."""
        assert self._head is not None
        norm, logits = self._head
        states_NH = norm(x_NH)
        if self._speculator is None:
            return draw(logits(states_NH), step)
        tokens_ST, logprobs_ST = _sampled(logits(states_NH), step)
        sampled = Sampled.beside(feed.tokens.view_as(tokens_ST), tokens_ST)
        drafts_SD = self._speculator.drafts(states_NH, sampled, step, feed, cache.latents[len(self.blocks) :])
        return Drawn.of(sampled.counted(), logprobs_ST, drafts_SD)


def draw(logits_NV: Tensor, step: LaneStep) -> Pending[Drawn]:
    """Sample after every token of a step, whose logits these are, without guesses."""
    tokens_ST, logprobs_ST = _sampled(logits_NV, step)
    return Drawn.of(tokens_ST, logprobs_ST, tokens_ST[:, 1:])


def _sampled(logits_NV: Tensor, step: LaneStep) -> tuple[Tensor, Tensor]:
    """Tokens, and their log-probabilities: each [S, T]."""
    tokens_N, logprobs_N = sample(logits_NV, step.ways.each(step.tokens.shape[1]), step.places())
    return tokens_N.view(step.tokens.shape), logprobs_N.view(step.tokens.shape)


def _head(model: Model) -> tuple[Multiply, Multiply]:
    """The final norm, and FP32 logits of what it returns."""
    norm, project = model.root.get_submodule("norm"), multiply(model.root.get_submodule("head"))  # type: ignore[arg-type]
    return normed(norm), lambda states_NH: project(states_NH).float()  # type: ignore[arg-type]


def _to_experts(spec: Spec, stage: Stage, name: str, layer: MoELayer) -> ToExperts:
    on_cpu = torch.device(spec.device).type == "cpu"
    if spec.ep_size == 1 and spec.fp8 is None and on_cpu:
        return in_memory(layer.experts)
    return dispatched([phase for phase in stage.phases if phase.layer == name and phase.name in _TO_EXPERTS])
