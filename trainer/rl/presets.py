"""Published recipes as config trees: what each paper states, and nothing else. Imports no torch.

`r1_zero` is the table in the Methods of DeepSeek-R1 (Nature 645, 633-638, 2025). Its clip ratio of 10 is stated for
R1's first RL stage only. With it the lower bound, -9, never binds: tokens of negative advantage are held back only by
the learning rate, the KL term and the refresh of the reference. The paper has no dual clip, and adding one would change
that silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

PresetName = Literal["grpo", "r1_zero", "dr_grpo", "dapo", "gspo", "cispo"]
Tables = Mapping[str, Mapping[str, object]]  # of a config

PRESETS: dict[PresetName, Tables] = {
    # DeepSeekMath, section 4.2
    "grpo": {
        "optim": {"lr": 1e-6},
        "rl": {
            "loss": {
                "baseline": "group_std",
                "clip_low": 0.2,
                "clip_high": 0.2,
                "aggregate": "sample_mean",
                "kl": 0.04,
            },
            "questions": 16,
            "samples": 64,
            "max_tokens": 1024,
        },
    },
    "r1_zero": {
        "optim": {"lr": 3e-6},
        "rl": {
            "loss": {
                "baseline": "group_std",
                "clip_low": 10.0,
                "clip_high": 10.0,
                "aggregate": "sample_mean",
                "kl": 0.001,
            },
            "questions": 32,
            "samples": 16,
            "minibatches": 16,
            "temperature": 1.0,
            "max_tokens": 32768,
            "reference_every": 400,
        },
    },
    "dr_grpo": {
        "optim": {"lr": 1e-6},
        "rl": {
            "loss": {"baseline": "group_mean", "aggregate": "token_sum"},
            "questions": 16,
            "samples": 8,
            "max_tokens": 3000,
        },
    },
    "dapo": {
        "optim": {"lr": 1e-6},
        "rl": {
            "loss": {"baseline": "group_std", "clip_low": 0.2, "clip_high": 0.28, "aggregate": "token_mean"},
            "questions": 32,
            "samples": 16,
            "minibatches": 16,
            "dynamic": True,
            "overlong": "penalty",
            "overlong_buffer": 4096,
            "max_tokens": 20480,
        },
    },
    "gspo": {
        "rl": {
            "loss": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "sample_mean"},
            "minibatches": 4,
        },
    },
    # MiniMax-M1: no lower bound, and a cap on the weight that the paper does not state; TRL's and ScaleRL's is 5.
    "cispo": {
        "rl": {"loss": {"clip": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregate": "token_mean"}},
    },
}
