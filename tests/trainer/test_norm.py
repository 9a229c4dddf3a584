"""The backward of RMSNorm by its definition; of its kernel in spawned/model_interpreted.py and test_model_cuda.py."""

from __future__ import annotations

import pytest
import torch

from dryvine.trainer.model.norm import norm_backward
from tests.support import norm as helpers_norm


@pytest.mark.parametrize(("rows", "width"), helpers_norm.SIZES)
@pytest.mark.parametrize("dtype", helpers_norm.DTYPES)
def test_both_gradients_equal_plain_autograd(rows: int, width: int, dtype: torch.dtype) -> None:
    given = helpers_norm.case(rows, width, dtype)
    helpers_norm.assert_near(norm_backward(*given), given)
