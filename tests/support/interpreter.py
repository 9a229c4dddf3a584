"""What kernels need to give hardware's bits under Triton's CPU interpreter. For processes with TRITON_INTERPRET set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

ROUNDED = {tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16}


@contextmanager
def right_casts() -> Iterator[None]:
    """The interpreter rounds FP32 -> E4M3 and BF16 wrongly (ties, saturation), widens BF16 subnormals wrongly and
    rounds a fused multiply-add twice; hardware and torch agree."""
    wrong, wrong_fma = interpreter._convert_float, interpreter.InterpreterBuilder.create_fma

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source == tl.float32 and target in ROUNDED:
            cast = torch.from_numpy(np.ascontiguousarray(data)).to(ROUNDED[target])
            integer, dtype = (torch.uint8, np.uint8) if cast.element_size() == 1 else (torch.int16, np.uint16)
            return cast.view(integer).numpy().view(dtype).reshape(data.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return data.view(np.uint16).astype(np.uint32) << 16
        return wrong(data, source, target, rounding)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        x, y, z = (v.data.astype(np.float64) for v in (x, y, z))
        return interpreter.TensorHandle((x * y + z).astype(np.float32), tl.float32)

    interpreter._convert_float, interpreter.InterpreterBuilder.create_fma = convert, fma
    with np.errstate(all="ignore"):
        yield
    interpreter._convert_float, interpreter.InterpreterBuilder.create_fma = wrong, wrong_fma
