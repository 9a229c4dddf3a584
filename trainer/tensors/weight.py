"""A weight and its gradient sum, as every module of the model and the optimizer's side know it.

Gradients of weights do not go through autograd's `.grad`, which has the weight's dtype and would round a BF16 model's
gradient once per microbatch. A layer's backward hands the weight a closure that adds to an FP32 sum beside it. The
weight knows the queue that holds such closures until the schedule's W, so that no layer is built with one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dryvine.trainer.tensors.int8 import Int8

Closure = Callable[[], None]


class Weight(nn.Parameter):
    """A parameter with its FP32 gradient sum, which ZeRO may set to a view of its own bucket.

    `expert`: dim 0 runs over this rank's routed experts, a contiguous slice of the global order. `int8`: its numbers,
    where they are in 8 bits and the weight itself has no memory; rows of all experts follow each other.
    """

    main_grad: Tensor | None = None
    expert: bool = False
    int8: Int8 | None = None
    queue: Callable[[Closure], None] | None = None  # set by the model that holds the weight

    def empty_on(self, device: torch.device | str) -> Weight:
        """The same kind of weight with memory of its own on another device, not filled."""
        new = Weight(torch.empty_like(self, device=device))
        new.expert, new.queue = self.expert, self.queue
        return new

    def gradient(self) -> Tensor:
        """`main_grad`, FP32 in the weight's shape; zeros at first use."""
        if self.main_grad is None:
            self.main_grad = torch.zeros_like(self, dtype=torch.float32, requires_grad=False)
        return self.main_grad

    def defer(self, add: Closure) -> None:
        """Queue `add`, which adds to `gradient()`; without a queue it runs at once, as plain autograd would.

        It may run outside any backward, and what it holds may still ask for gradients: it runs without autograd.
        """
        closure = torch.no_grad()(add)
        if self.queue is None:
            closure()
        else:
            self.queue(closure)
