"""The file that `dryvine profile` writes. Reading it needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ValidationError

from dryvine.launch.plan.times import OpTimes, PhaseTimes
from dryvine.trainer.config import Config, ConfigError


class Profile(BaseModel, frozen=True, extra="forbid"):
    """Seconds of one microbatch in each kind of block on one device, and of an optimizer step per element."""

    device: str
    model: dict[str, object]  # of the config that was measured
    dtype: str
    fp8: bool
    tokens: int  # of the microbatch
    seq_len: int
    phases: dict[str, dict[str, tuple[float, float, float]]]  # kind of block -> phase -> F, I, W
    whole: float = 1.0  # a B over the sum of its I and its W, which run beside each other
    update_seconds: float  # gradients zeroed, AdamW, clip and publication, per element owned

    def times(self) -> dict[str, PhaseTimes]:
        return {kind: {p: OpTimes(*t) for p, t in phases.items()} for kind, phases in self.phases.items()}

    def check(self, config: Config) -> None:
        """Raise ConfigError unless the config's microbatches are those that were measured. Layouts may differ."""
        tokens = config.parallel.microbatch_sequences * config.data.seq_len
        asked = (config.model.model_dump(mode="json"), config.run.dtype, config.fp8.fp8, tokens, config.data.seq_len)
        if asked == (self.model, self.dtype, self.fp8, self.tokens, self.seq_len):
            return
        raise ConfigError(
            f"the profile is of another model, dtype or microbatch ({self.tokens} tokens in {self.dtype}); "
            "run `dryvine profile` with this config"
        )


def read_profile(path: Path) -> Profile:
    """Raises ConfigError."""
    try:
        return Profile.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError, ValidationError) as error:
        raise ConfigError(f"{path}: no profile ({str(error).splitlines()[0]}); `dryvine profile` writes one") from None
