"""All cast kernels under the names of reference.py, for whoever picks between the two by device."""

from dryvine.trainer.fp8.kernels.cast import (
    pack_e5m6,
    quantize_blocks,
    quantize_both,
    quantize_columns,
    quantize_rows,
    unpack_e5m6,
)
from dryvine.trainer.fp8.kernels.fused import rmsnorm, rmsnorm_rows, swiglu_backward, swiglu_rows

__all__ = [
    "pack_e5m6",
    "quantize_blocks",
    "quantize_both",
    "quantize_columns",
    "quantize_rows",
    "rmsnorm",
    "rmsnorm_rows",
    "swiglu_backward",
    "swiglu_rows",
    "unpack_e5m6",
]
