"""From logits to tokens: each a function of its request's seed, its position and its logits, and of nothing else.

With one generator per batch, as other samplers have, a request's tokens change whenever its neighbours do. Here the
random number of a token is a hash of (seed, position): there is no state to store, move with a slot or send to another
rank, and whoever has the logits can sample the token again. Tokens are drawn by inverting the cumulative distribution,
which needs one random number; the Gumbel trick needs one for each word of the vocabulary.

Legend: S sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dryvine.comm.pending import Pending
from dryvine.trainer.generate.requests import Request

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each pair: splitmix64 (Steele et al., OOPSLA 2014) of the seed's own stream."""
    bits = _mixed(_mixed(seeds + _GOLDEN) + positions * _GOLDEN) >> np.uint64(12)
    return bits.astype(np.float64) * 2.0**-52


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Ways(NamedTuple):
    """The sampling parameters of S sequences."""

    temperatures: Tensor | None  # FP32 [S, 1], with 1 for 0; None: all 1
    greedy: Tensor | None  # bool [S]; None: none is
    top_p: Tensor | None  # FP64 [S, 1]; None: all 1
    seeds: NDArray[np.uint64]  # [S]

    @staticmethod
    def of(requests: Sequence[Request], device: torch.device) -> Ways:
        """The parameters of a batch of requests, in their order."""
        heat = np.array([request.temperature for request in requests], np.float64)
        top_p = np.array([request.top_p for request in requests], np.float64)
        seeds = np.array([request.seed % (1 << 64) for request in requests], np.uint64)
        return Ways.of_columns(heat, top_p, seeds, device)

    @staticmethod
    def of_columns(
        heat: NDArray[np.float64], top_p: NDArray[np.float64], seeds: NDArray[np.uint64], device: torch.device
    ) -> Ways:
        """Temperatures, top_p and seeds, each [S]."""
        greedy, divide = heat == 0, np.where(heat == 0, 1.0, heat)
        return Ways(
            torch.from_numpy(divide).float().to(device).unsqueeze(1) if (divide != 1).any() else None,
            torch.from_numpy(greedy).to(device) if greedy.any() else None,
            torch.from_numpy(top_p.copy()).to(device).unsqueeze(1) if (top_p != 1).any() else None,
            seeds.copy(),
        )

    def each(self, times: int) -> Ways:
        """Those of every sequence, so many times in a row."""
        if times == 1:
            return self
        heat, greedy, top_p = (None if part is None else part.repeat_interleave(times, 0) for part in self[:3])
        return Ways(heat, greedy, top_p, self.seeds.repeat(times))


class Drawn(NamedTuple):
    """The tokens after those that a step fed to each slot, -1 after a wrong draft, with their log-probabilities, FP64;
    and guesses of those that come then. [S, T], [S, T], [S, T - 1]."""

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    drafts: NDArray[np.int64]

    @staticmethod
    def of(tokens_ST: Tensor, logprobs_ST: Tensor, drafts_SD: Tensor) -> Pending[Drawn]:
        """To be waited for: a GPU has not computed them yet."""
        parts = tokens_ST, logprobs_ST.double(), drafts_SD
        return Pending(lambda: Drawn(*(part.cpu().numpy() for part in parts)))


def sample(logits_SV: Tensor, ways: Ways, positions: NDArray[np.uint64]) -> tuple[Tensor, Tensor]:
    """FP32 logits, and each token's place in its sequence, the prompt counted -> tokens int64 [S], and their
    log-probabilities in the full softmax at the temperature, FP32 [S]. Where a logit is not finite, NaN."""
    if ways.temperatures is not None:
        logits_SV = logits_SV / ways.temperatures
    logprobs_SV = logits_SV.log_softmax(-1)
    if ways.greedy is not None and ways.greedy.all():
        tokens = logprobs_SV.argmax(-1)
    else:
        tokens = _drawn(logprobs_SV, ways, positions)
        if ways.greedy is not None:
            tokens = torch.where(ways.greedy, logprobs_SV.argmax(-1), tokens)
    return tokens, logprobs_SV.gather(1, tokens.unsqueeze(1)).squeeze(1)


def _drawn(logprobs_SV: Tensor, ways: Ways, positions: NDArray[np.uint64]) -> Tensor:
    # The sum over a large vocabulary would lose the small probabilities in FP32.
    probs_SV = logprobs_SV.double().exp_()
    if ways.top_p is not None:
        probs_SV = _nucleus(probs_SV, ways.top_p)
    sums_SV = probs_SV.cumsum_(-1)
    u_S1 = torch.from_numpy(uniforms(ways.seeds, positions)).to(sums_SV.device).unsqueeze(1)
    drawn = torch.searchsorted(sums_SV, u_S1 * sums_SV[:, -1:], right=True).squeeze(1)
    # NaN marks logits that are not finite.
    return drawn.clamp_(max=sums_SV.shape[1] - 1)


def _nucleus(probs_SV: Tensor, top_p_S1: Tensor) -> Tensor:
    """Zero what is outside the fewest best tokens that have `top_p` together. Rows with top_p 1 stay as they are."""
    best_SV, order_SV = probs_SV.sort(stable=True, dim=-1, descending=True)
    before_SV = best_SV.cumsum(-1) - best_SV
    outside_SV = (before_SV >= top_p_S1) & (top_p_S1 < 1)
    return probs_SV.masked_fill(torch.zeros_like(outside_SV).scatter_(1, order_SV, outside_SV), 0.0)
