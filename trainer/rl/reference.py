"""The reference policy: a copy of the master weights, sharded as they are, which takes their place for a forward pass.

A second model would take as much memory as the first on every rank; this takes four bytes a parameter over all ranks.
Gate biases are frozen in reinforcement learning, so the two share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from dryvine.trainer.rig import Rig

FIELD = "reference"  # of a checkpoint's pieces


class Reference:
    """Starts as a copy of the current weights."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._shards = [bucket.master.clone() for bucket in rig.optimizer.zero.buckets]

    def refresh(self) -> None:
        """Make the current weights the reference."""
        for shard, bucket in zip(self._shards, self._rig.optimizer.zero.buckets, strict=True):
            shard.copy_(bucket.master)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context, all copies of the weights hold the reference's values. Collective."""
        self._rig.publish(self._shards)
        yield
        self._rig.publish()

    def pieces(self) -> Mapping[tuple[str, int], Tensor]:
        """(parameter, first element) -> this rank's part, live."""
        pairs = zip(self._shards, self._rig.optimizer.zero.buckets, strict=True)
        return {(p.name, p.start): shard[p.in_shard] for shard, bucket in pairs for p in bucket.pieces()}
