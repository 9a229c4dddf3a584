"""Cross entropy, and log-probabilities by token, with a single copy of the logits, in the model's dtype, which is
overwritten with their gradient.

At a vocabulary of 129280 the FP32 logits of one 4096-token sequence are 2.1 GB; plain autograd keeps them, their
log-softmax and the gradient. Here FP32 values exist only in slices that fit a CPU's cache, and on a GPU in registers.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dryvine.comm.by_device import kernel_in
from dryvine.trainer.model.lesson import Scored
from dryvine.trainer.model.memory import SLICE_ELEMENTS
from dryvine.trainer.tensors.context import Context, for_later

KERNELS = "dryvine.trainer.model.kernels.loss"


def _slices(logits_NV: Tensor) -> Iterator[slice]:
    rows = max(1, SLICE_ELEMENTS // logits_NV.shape[1])
    return (slice(start, start + rows) for start in range(0, logits_NV.shape[0], rows))


@kernel_in(KERNELS)
def log_sum_exp(logits_NV: Tensor) -> Tensor:
    """log sum exp of each row, FP32 [N]."""
    return torch.cat([logits_NV[part].float().logsumexp(-1) for part in _slices(logits_NV)])


@kernel_in(KERNELS)
def logits_to_gradient(logits_NV: Tensor, targets_N: Tensor, norms_N: Tensor, scales_N: Tensor) -> None:
    """Overwrite logits with scale * d loss / d logits: the gradient of a sum of losses, each times its FP32 scale."""
    for part in _slices(logits_NV):
        # FP32 logits themselves; of others a copy.
        grad = logits_NV[part].float().sub_(norms_N[part].unsqueeze(1)).exp_()
        grad[torch.arange(len(grad)), targets_N[part]] -= 1
        torch.mul(grad, scales_N[part].unsqueeze(1), out=logits_NV[part])


def _norms(logits_NV: Tensor) -> Tensor:
    """log sum exp of each row, FP32 [N]. On a CPU, FP32 logits become their log-softmax, whose norms are 0: that is one
    of torch's kernels, which reads and writes each row once, for four that each pass over a slice."""
    if logits_NV.is_cuda or logits_NV.dtype != torch.float32:
        return log_sum_exp(logits_NV)
    for part in _slices(logits_NV):
        torch.log_softmax(logits_NV[part], -1, out=logits_NV[part])
    return logits_NV.new_zeros(len(logits_NV))


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Context, logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor | None) -> Tensor:
        norm_N = _norms(logits_NV)
        ctx.save_for_backward(logits_NV, targets_N, norm_N, *([] if weights_N is None else [weights_N]))
        hit_N = logits_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1).float()
        losses_N = norm_N - hit_N
        return losses_N.mean() if weights_N is None else (losses_N * weights_N).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dloss: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, targets_N, norm_N, *weights = for_later(ctx)
        scale = dloss / targets_N.shape[0]
        scales_N = scale * weights[0] if weights else scale.expand(targets_N.shape[0])
        logits_to_gradient(logits_NV, targets_N, norm_N, scales_N.contiguous())
        return logits_NV, None, None


class _ScoredContext(Context, Protocol):
    temperature: float

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


class _TargetLogprobs(Function):
    @staticmethod
    def forward(ctx: _ScoredContext, logits_NV: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        if temperature != 1.0:
            logits_NV.div_(temperature)
        norm_N, entropies_N = _norms(logits_NV), torch.empty_like(targets_N, dtype=torch.float32)
        for part in _slices(logits_NV):
            logits = logits_NV[part].float()
            # -sum p log p = log sum exp - sum p x
            chances = (logits - norm_N[part].unsqueeze(1)).exp_()
            entropies_N[part] = norm_N[part] - chances.mul_(logits).sum(-1)
        ctx.save_for_backward(logits_NV, targets_N, norm_N)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies_N)
        return logits_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1).float() - norm_N, entropies_N

    @staticmethod
    @once_differentiable
    def backward(ctx: _ScoredContext, dlogprobs_N: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, targets_N, norm_N = for_later(ctx)
        logits_to_gradient(logits_NV, targets_N, norm_N, (dlogprobs_N / -ctx.temperature).contiguous())
        return logits_NV, None, None


def target_logprobs(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> Scored:
    """log softmax(logits / temperature)[target] of each row, and the entropy. The logits are overwritten with their
    gradient in the backward: do not read them afterwards."""
    return Scored(*_TargetLogprobs.apply(logits_NV, targets_N, temperature))


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """FP32 mean of -log softmax(logits)[target], each times its weight (FP32, no gradient) if weights are given. The
    logits are overwritten with their gradient: do not read them afterwards."""
    return _CrossEntropy.apply(logits_NV, targets_N, weights_N)
