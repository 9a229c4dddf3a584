"""Which memory a stretch of code leaves behind, storage by storage, on any device.

Every tensor that an operator makes meanwhile is noted by its storage, through a weak reference; what is alive
afterwards is kept by something. The allocator's own figure includes caches that a microbatch replaces rather than
keeps, and a CPU's allocator has no such figure. Saved-tensor hooks see what autograd saves, but not what a handle or a
closure holds, nor what the code's own hooks (recompute) have packed.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Census(TorchDispatchMode):
    """`with Census() as census: ...`, then `census.alive()`."""

    def __init__(self) -> None:
        super().__init__()
        # By the id of the storage, which another may have once it is freed.
        self._seen: dict[int, tuple[weakref.ref[torch.UntypedStorage], tuple[object, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        self.note([t for t in _tensors(out) if id(t.untyped_storage()) not in inputs], func)
        return out

    def note(self, values: Iterable[torch.Tensor], made_by: object) -> None:
        """Count these too, which no operator made here: a phase's input, say."""
        for value in values:
            storage = value.untyped_storage()
            self._seen[id(storage)] = weakref.ref(storage), (made_by, tuple(value.shape), value.dtype)

    def alive(self) -> list[tuple[int, str]]:
        """(bytes, by which operator, of which shape and dtype) of each storage that is still held, largest first."""
        gc.collect()
        alive = [(storage, made) for ref, made in self._seen.values() if (storage := ref()) is not None]
        return sorted(((storage.nbytes(), " ".join(map(str, made))) for storage, made in alive), reverse=True)

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.alive())


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
