"""Which variants of its kernels a piece of code makes Triton load: one for each way of its arguments that Triton
compiles apart. For processes with TRITON_INTERPRET set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

Variant = tuple[str, tuple[object, ...]]


@contextmanager
def recorded() -> Iterator[set[Variant]]:
    """What is launched within."""
    variants: set[Variant] = set()
    run = InterpretedFunction.run

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = self.kwargs.get("do_not_specialize") or ()
        named = dict(zip(self.arg_names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in self.arg_names}
        variants.add((self.__name__, tuple((n, *_way(v, n in plain)) for n, v in named.items())))
        return run(self, *args, **kwargs)

    InterpretedFunction.run = record
    yield variants
    InterpretedFunction.run = run


def _way(value: object, plain: bool) -> tuple[object, ...]:
    """What Triton looks at: types, multiples of 16 and ones. Constants of a kernel, small integers too, count whole."""
    if isinstance(value, torch.Tensor):
        return value.dtype, plain or value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return ("int",) if plain else ("int", value == 1, value % 16 == 0)
    return (value,)
