"""The FP8 engines by the name that `fp8.gemm` takes: the one list of them. A new engine is its file and its line here.

Without torch, since the config is read on machines without it: a class is named by a string and imported when needed.
So mypy cannot check the table; it checks the classes, which derive from `Engine`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dryvine.trainer.fp8.engines.protocol import Engine

# In the order in which `auto` measures them.
ENGINES = {
    "emulate": "dryvine.trainer.fp8.engines.emulate:Emulate",
    "torch": "dryvine.trainer.fp8.engines.torch:Torch",
    "triton": "dryvine.trainer.fp8.engines.triton:Triton",
    "deep_gemm": "dryvine.trainer.fp8.engines.deep_gemm:DeepGemm",
    "transformer_engine": "dryvine.trainer.fp8.engines.transformer_engine:TransformerEngine",
}


def make_engine(name: str) -> Engine:
    """The engine of that name, with its defaults."""
    module, _, kind = ENGINES[name].partition(":")
    engine: Engine = getattr(import_module(module), kind)()
    return engine
