"""A function in two versions: plain torch, which defines the result and runs on a CPU, and a kernel for the GPU.

    @kernel_in("dryvine.comm.dispatch.kernels")
    def gather(rows: Tensor, index: Tensor) -> Tensor: ...

Each call picks by where its first argument lies. The kernel has the same name and signature (tested) in the module that
is named; it is imported at the first call on a GPU, since it needs triton and only a GPU's host must have it. Being
named by a string, it may import whatever the definition's module does. Tests compare `gather.reference` with
`gather.kernel`. An `if` in each function would do too, but then every reader has to check that the two branches agree.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, update_wrapper
from importlib import import_module
from typing import Concatenate, Generic, ParamSpec, Protocol, TypeVar


class OnDevice(Protocol):
    """A tensor, or a value made of tensors that lie together."""

    @property
    def is_cuda(self) -> bool: ...


T = TypeVar("T", bound=OnDevice)
P = ParamSpec("P")
R = TypeVar("R")


class ByDevice(Generic[T, P, R]):
    """`reference` for a first argument on the CPU, `kernel` for one on a GPU."""

    def __init__(self, reference: Callable[Concatenate[T, P], R], module: str) -> None:
        self.reference, self.module = reference, module
        update_wrapper(self, reference)

    @cached_property
    def kernel(self) -> Callable[Concatenate[T, P], R]:
        found: Callable[Concatenate[T, P], R] = getattr(import_module(self.module), self.reference.__name__)
        return found

    def __call__(self, first: T, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return (self.kernel if first.is_cuda else self.reference)(first, *args, **kwargs)


def kernel_in(module: str) -> Callable[[Callable[Concatenate[T, P], R]], ByDevice[T, P, R]]:
    """Decorates a definition in torch: on a GPU the function of the same name in `module` runs in its place."""
    return lambda reference: ByDevice(reference, module)
