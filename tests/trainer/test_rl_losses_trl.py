"""Objectives against TRL's own, on random tensors, for the choices that both have."""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dryvine.trainer.rl.choices import LossChoices
from tests.support.rl_losses import draw, loss_of, packed, with_shares

LENGTHS = (3, 7, 16, 12, 5, 9)
MAX = 16
ARGS = ("delta", "use_bias_correction_kl")  # which TRL reads elsewhere
# TRL's name of the loss, what else it is told, and the same in our choices.
PAIRS: dict[str, tuple[dict[str, Any], LossChoices]] = {
    "grpo": ({"loss_type": "grpo", "beta": 0.04}, LossChoices(kl=0.04)),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, LossChoices(clip_high=0.28, aggregate="token_mean")),
    "dr_grpo": ({"loss_type": "dr_grpo"}, LossChoices(aggregate="token_sum")),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
        LossChoices(ratio="sequence", clip_low=0.03, clip_high=0.04),
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.3},
        LossChoices(clip="cispo", clip_low=1.0, clip_high=0.3, aggregate="token_mean"),
    ),
    "two-sided": ({"loss_type": "grpo", "delta": 1.5}, LossChoices(dual_clip=1.5)),
    "unbiased KL": (
        {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": True},
        LossChoices(aggregate="token_mean", kl=0.1, kl_estimator="k3_unbiased"),
    ),
    "stale": ({"loss_type": "grpo", "off_policy_mask_threshold": 0.05}, LossChoices(stale_mask=0.05)),
}


def trl_loss(told: dict[str, Any], logprobs: list[torch.Tensor], tokens: list[Any]) -> torch.Tensor:
    """`GRPOTrainer._compute_loss` of answers padded to one length, on a stand-in for the trainer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.grpo_trainer import GRPOTrainer

    pad = lambda rows: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # noqa: E731
    mask = pad([torch.ones(len(row)) for row in logprobs])
    padded = pad(logprobs)
    settings = {
        "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "importance_sampling_level": "token",
        "off_policy_mask_threshold": None, **{key: told[key] for key in told if key not in ARGS},
    }  # fmt: skip
    trainer = SimpleNamespace(
        **settings,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(
            delta=told.get("delta"),
            use_bias_correction_kl=told.get("use_bias_correction_kl", False),
            steps_per_generation=1,
        ),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda value: value, reduce=lambda value, reduction: value),
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded, torch.zeros_like(padded), None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        use_vllm=False,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": torch.zeros(len(tokens), 1, dtype=torch.int64), "prompt_mask": torch.ones(len(tokens), 1),
        "completion_ids": torch.zeros_like(mask, dtype=torch.int64), "completion_mask": mask,
        "advantages": torch.stack([one.advantage[0] for one in tokens]),
        "old_per_token_logps": pad([one.old for one in tokens]),
        "sampling_per_token_logps": pad([one.sampled for one in tokens]),
        "ref_per_token_logps": pad([one.reference for one in tokens]),
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.long
@pytest.mark.parametrize("name", PAIRS)
def test_an_objective_is_trls(name: str) -> None:
    told, choices = PAIRS[name]
    for seed in range(5):
        logprobs, tokens = draw(seed, LENGTHS)
        tokens = with_shares(choices, tokens, MAX)
        ours = loss_of(choices, *packed(list(zip(logprobs, tokens, strict=True)), padding=2))
        theirs = trl_loss(told, logprobs, tokens)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        found, wanted = torch.autograd.grad(ours, logprobs), torch.autograd.grad(theirs, logprobs)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
