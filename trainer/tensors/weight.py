"""A weight and its gradient sum, as every module of the model and the optimizer's side know it.

Gradients of weights do not go through autograd's `.grad`, which has the weight's dtype and would round a BF16 model's
gradient once per microbatch. They are added into an FP32 tensor beside the weight, by closures on the WGrad queue.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Weight(nn.Parameter):
    """A parameter with its FP32 gradient sum, which ZeRO may set to a view of its own bucket.

    `expert`: dim 0 runs over this rank's routed experts, a contiguous slice of the global order.
    """

    main_grad: Tensor | None = None
    expert: bool = False

    def gradient(self) -> Tensor:
        """`main_grad`, FP32 in the weight's shape; zeros at first use."""
        if self.main_grad is None:
            self.main_grad = torch.zeros_like(self, dtype=torch.float32, requires_grad=False)
        return self.main_grad
