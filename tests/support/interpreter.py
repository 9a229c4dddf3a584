"""What kernels need to give hardware's bits under Triton's CPU interpreter. For processes with TRITON_INTERPRET set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

from dryvine.trainer.fp8.kernels import ptx

ROUNDED = {tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16}


def _e4m3(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _inverse(s: np.ndarray) -> np.ndarray:
    """1 / s in the range in which a GPU was compared with it; NaN outside, so that leaving it is noticed."""
    known = (s >= 2.0**-120) & (s < 2.0**121)
    return np.where(known, 1.0 / s.astype(np.float64), np.nan).astype(np.float32)


def _bytes(v: np.ndarray, keep: np.ndarray) -> np.ndarray:
    assert np.isin(keep, (0, -1)).all()
    return _e4m3(v) & keep.astype(np.uint8)


def _word(*parts: np.ndarray) -> np.ndarray:
    return np.sum([p.astype(np.uint32) << (8 * i) for i, p in enumerate(parts)], 0, np.uint32).view(np.int32)


PTX: dict[str, Callable[..., np.ndarray]] = {
    ptx.INVERSE.value: _inverse,
    ptx.WIDEN.value: lambda x: (x.view(np.uint16).astype(np.uint32) << 16).view(np.int32),
    ptx.BYTES.value: _bytes,
    ptx.WORD.value: lambda *v: _word(*map(_e4m3, v)),
    ptx.TURN.value: _word,
}


class _Results(list[interpreter.TensorHandle]):
    """As the compiler's builder returns them."""

    def get_result(self, i: int) -> interpreter.TensorHandle:
        return self[i]


def _inline_asm(self: Any, asm: str, constraints: str, values: Any, types: Any, pure: bool, pack: int) -> _Results:
    return _Results([interpreter.TensorHandle(PTX[asm](*(v.data for v in values)), types[0].scalar)])


@contextmanager
def right_casts() -> Iterator[None]:
    """The interpreter rounds FP32 -> E4M3 and BF16 wrongly (ties, saturation), widens BF16 subnormals wrongly, rounds a
    fused multiply-add twice, returns a NaN where a maximum or minimum drops it, and has no PTX; hardware and torch
    agree."""
    wrong = interpreter._convert_float

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

    operations = {
        "create_fma": fma,
        "create_inline_asm": _inline_asm,
        "create_maxnumf": lambda self, x, y: self.binary_op(x, y, np.fmax),
        "create_minnumf": lambda self, x, y: self.binary_op(x, y, np.fmin),
    }
    with (
        mock.patch.object(interpreter, "_convert_float", convert),
        mock.patch.multiple(interpreter.InterpreterBuilder, **operations),
        np.errstate(all="ignore"),
    ):
        yield
