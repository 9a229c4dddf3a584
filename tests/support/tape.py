"""CUDA graphs as they behave, on a CPU: for `parallel.graphs`.

While a function is recorded its operators are written on a tape; a replay calls them again and puts each result
where it was. As on a GPU, recording changes nothing that existed before; a replay knows addresses and numbers and no
Python; and memory that a recording gave back is taken by later recordings of its pool, for tensors that last too. So a
replay here leaves NaN in all that later recordings of its pool have made, and in what nobody of the pool holds. What a
GPU adds in another order in each run is refused, since a CPU's bits would not show it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dryvine.comm.live_steps import LiveStep, LiveSteps

T = TypeVar("T")
_ATEN = torch.ops.aten
BY_ATOMICS = (_ATEN.index_add, _ATEN.index_add_, _ATEN.scatter_add, _ATEN.scatter_add_)
Call = tuple[Any, Any, Any, list[Tensor]]  # operator, arguments, results


def _alias(tensor: Tensor) -> Tensor:
    """The same memory by another object, so that the tape keeps no object that autograd or the model would hold, and
    without the version that a saved tensor must still have."""
    return tensor.data


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Tape(TorchDispatchMode):
    """One recording."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.parts: list[LiveStep] = []  # what replays it: the calls, cut where something is live
        self._cut = 0
        self.made: dict[int, list[Tensor]] = {}  # address of memory that the recording allocated -> aliases
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # memory from outside that was written to, and what it held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("the host reads the device in a graph")
        if func.overloadpacket in BY_ATOMICS:
            _refuse_other_orders(*args[1:4])
        args_, kwargs_ = (tree_map_only(Tensor, _alias, tree) for tree in (args, kwargs))
        for argument, given in zip(func._schema.arguments, args_, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(given):
                    self._about_to_write(tensor)
        result = func(*args, **kwargs)
        given_memory = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        results = [_alias(t) for t in _tensors(result)]
        for tensor in results:
            where = tensor.untyped_storage().data_ptr()
            if where not in given_memory:
                self.made.setdefault(where, []).append(tensor)
        self.calls.append((func, args_, kwargs_, results))
        return result

    def _about_to_write(self, tensor: Tensor) -> None:
        where = tensor.untyped_storage().data_ptr()
        if where not in self.made and where not in self.before:
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            self.before[where] = (whole, whole.clone())

    def cut(self, step: LiveStep) -> None:
        self.parts.append(LiveStep(partial(_replay, self.calls[self._cut :])))
        self.parts.append(step)
        self._cut = len(self.calls)

    def end(self, over: Callable[[], None]) -> None:
        self.cut(LiveStep(over))

    def undo(self) -> None:
        """A recording runs nothing."""
        for tensor, value in self.before.values():
            tensor.copy_(value)
        for aliases in self.made.values():
            _poison(aliases[0])


def _refuse_other_orders(dim: int, index: Tensor, values: Tensor) -> None:
    """Raise where one element gets several numbers whose sum depends on their order: all but integers."""
    along = 0 if index.dim() == 1 else dim
    several = (index.sort(along).values.diff(dim=along) == 0).any()
    if several and not torch.equal(values, values.round()):
        raise AssertionError("a GPU adds these in another order in each run: use tensors.in_order")


def _poison(tensor: Tensor) -> None:
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    whole.fill_(torch.nan if whole.is_floating_point() else 0)


@torch.no_grad()
def _replay(calls: Sequence[Call]) -> None:
    for func, args, kwargs, results in calls:
        again = _tensors(func(*args, **kwargs))
        # Its other results are for its own backward, and as long as its list of indices is.
        count = 1 if "embedding_bag" in str(func) else len(again)
        for then, now in zip(results[:count], again[:count], strict=True):
            if then.data_ptr() != now.data_ptr():
                then.copy_(now)


class TapePool:
    """The recordings of one pool, in their order."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.unheld: list[Tensor] | None = None  # by anybody but tapes
        self.replayed = 0

    def overwrite(self, replayed: Tape) -> None:
        """What a replay may have written to beside its own."""
        self.replayed += 1
        self.unheld = self._unheld() if self.unheld is None else self.unheld
        later = self.tapes[self.tapes.index(replayed) + 1 :]
        for tensor in (*self.unheld, *(made[0] for tape in later for made in tape.made.values())):
            _poison(tensor)

    def _unheld(self) -> list[Tensor]:
        aliases: dict[int, dict[int, Tensor]] = {}
        for tape in self.tapes:
            for _, args, kwargs, results in tape.calls:
                for tensor in (*_tensors((args, kwargs)), *results):
                    aliases.setdefault(tensor.untyped_storage().data_ptr(), {})[id(tensor)] = tensor
        found = []
        for where in {where for tape in self.tapes for where in tape.made}:
            own = list(aliases[where].values())
            memory = own[0].untyped_storage()
            if torch._C._storage_Use_Count(memory._cdata) <= len(own) + 1:
                found.append(own[0])
        return found


class TapeRecorder:
    """A `Recorder`."""

    def __init__(self, live: LiveSteps | None = None) -> None:
        self.live = live or LiveSteps()
        self.pools: list[TapePool] = []
        self.freed = 0

    def pool(self) -> Any:
        self.pools.append(TapePool())
        return self.pools[-1]

    def record(self, run: Callable[[], T], pool: Any) -> tuple[list[LiveStep], T]:
        tape = Tape()
        with tape, self.live.recorded_by(tape.cut):
            made = run()
        tape.end(lambda: pool.overwrite(tape))
        tape.undo()
        pool.tapes.append(tape)
        pool.unheld = None
        return tape.parts, made

    @property
    def replayed(self) -> int:
        return sum(pool.replayed for pool in self.pools)

    def free(self) -> None:
        self.freed += 1
