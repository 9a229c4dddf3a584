"""A rank of a run of reinforcement learning with the verifier in digits.py: CONFIG [table.key=value ...]."""

from __future__ import annotations

import sys

from dryvine.trainer.__main__ import main
from dryvine.trainer.rl.verifiers.names import VERIFIERS

if __name__ == "__main__":
    VERIFIERS["digits"] = "digits"
    sys.exit(main(sys.argv[1:]))
