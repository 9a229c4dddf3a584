"""MTP as a self-speculator: the model's own module guesses tokens, and a step that feeds them checks them.

With D depths (arXiv 2412.19437, section 2.2; V3 has one) a step feeds each slot its newest token, at position n, and D
drafts behind it. The main model samples after each of them, as it samples after any token: a function of its logits and
of (seed, position). A draft that equals the token sampled before it was the right input, so the token sampled after it
counts too, and up to 1 + D tokens come of one step. What follows a wrong draft is dropped: its latents lie at positions
that the next step writes before anything may look at them. So tokens, log-probabilities and routes are those of
decoding without drafts, up to the rounding of products with more rows. Rejection sampling, as servers use it, keeps
the distribution only: its tokens depend on the drafts, and so on the MTP module.

The next drafts come of the same step. Depth k reads, at every position p that the step confirmed, the states of the
depth before and the token at p + k; behind the newest token that is a draft of the depths before. A draft is drawn as
the next token will be, from its own distribution with the random number of its place: where the two distributions
agree so do the tokens, at any temperature. The depths' latents are further layers of the last stage's cache. Head and
MTP are always on one stage, so in a pipeline drafts are made where tokens are sampled, and travel with them.

An answer's first step has no draft yet and feeds its newest token again, which costs one row. Depths beyond the first
keep in their cache what they read of drafts that were wrong, which may cost later drafts, and changes no token.

Legend: S slots, D depths, T = 1 + D tokens fed to a slot, N = S x T, H hidden, W width of a latent, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dryvine.trainer.generate.feed import Feed, LaneStep
from dryvine.trainer.generate.layers import CachedMixture, Multiply, ToExperts, multiply, normed
from dryvine.trainer.generate.sampling import sample
from dryvine.trainer.model.mtp import MTP


class CachedDepth:
    """One depth of MTP with a cache."""

    def __init__(self, module: MTP, to_experts: ToExperts) -> None:
        self.norm_h, self.norm_e, self.norm = normed(module.norm_h), normed(module.norm_e), normed(module.norm)
        self.project, self.block = multiply(module.project), CachedMixture(module.layer, to_experts)

    def __call__(self, states_NH: Tensor, embedded_NH: Tensor, feed: Feed, latents_SPW: Tensor) -> Tensor:
        """Normed states of the depth before, and embeddings of tokens ahead -> this depth's normed states."""
        x_NH = self.project(torch.cat((self.norm_e(embedded_NH), self.norm_h(states_NH)), 1))
        return self.norm(self.block(x_NH, feed, latents_SPW)[0])


class Sampled(NamedTuple):
    """What the main model sampled after each token of a step."""

    tokens: Tensor  # int64 [S, T]
    accepted: Tensor  # int64 [S]: how many drafts of a slot were right, up to the first wrong one

    @staticmethod
    def beside(fed_ST: Tensor, tokens_ST: Tensor) -> Sampled:
        """Compare the drafts that were fed with the tokens that were sampled in their places."""
        right_SD = tokens_ST[:, :-1] == fed_ST[:, 1:]
        return Sampled(tokens_ST, right_SD.long().cumprod(1).sum(1))

    def counted(self) -> Tensor:
        """The tokens, and -1 for those sampled after a wrong draft."""
        behind_T = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return self.tokens.masked_fill(behind_T > self.accepted.unsqueeze(1), -1)


class Speculator:
    """All depths. Every method is collective over ranks that share experts."""

    def __init__(self, depths: Sequence[CachedDepth], table_VH: Tensor, logits: Multiply) -> None:
        """`logits`: of normed states."""
        self.depths, self._table_VH, self._logits = depths, table_VH, logits

    def read(self, states_NH: Tensor, feed: Feed, latents_DSPW: Tensor) -> None:
        """Cache what the depths make of a prompt: normed states of the main model, and the tokens `feed.following`."""
        for depth, tokens_N, latents_SPW in zip(self.depths, feed.following, latents_DSPW, strict=True):
            states_NH = depth(states_NH, functional.embedding(tokens_N, self._table_VH), feed, latents_SPW)

    def drafts(self, states_NH: Tensor, sampled: Sampled, step: LaneStep, feed: Feed, latents_DSPW: Tensor) -> Tensor:
        """Guesses of the tokens after the newest one: int64 [S, D]."""
        count, width = sampled.tokens.shape
        # Token j of a row stands j + 1 places behind the first one fed: sampled ones, then room for drafts.
        ahead = functional.pad(sampled.tokens, (0, len(self.depths)))
        last_S = sampled.accepted + torch.arange(count, device=ahead.device) * width
        newest = step.positions + sampled.accepted.cpu().numpy() + 1
        for k, (depth, latents_SPW) in enumerate(zip(self.depths, latents_DSPW, strict=True)):
            embedded_NH = functional.embedding(ahead[:, k : k + width].flatten(), self._table_VH)
            states_NH = depth(states_NH, embedded_NH, feed, latents_SPW)
            drawn_S, _ = sample(self._logits(states_NH[last_S]), step.ways, (newest + k + 1).astype(np.uint64))
            ahead.scatter_(1, (sampled.accepted + k + 1).unsqueeze(1), drawn_S.unsqueeze(1))
        places = sampled.accepted.unsqueeze(1) + torch.arange(1, width, device=ahead.device)
        return ahead.gather(1, places)
