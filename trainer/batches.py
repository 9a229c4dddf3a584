"""The microbatches of a step on one rank: token ids, and with `data.mask = "document"` the document boundaries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from dryvine.parallel.executor import Batch
from dryvine.trainer.data.source import PartlyLearnt, SequenceSource
from dryvine.trainer.model.documents import Documents, documents_of, same_document
from dryvine.trainer.rig import Rig

Numbers = NDArray[np.int64]  # the number of each token's document, [sequences, seq_len + extra]


def read_batch(rig: Rig, source: SequenceSource, first: int, sequences: int) -> Batch:
    """This data rank's microbatches of the `sequences` from number `first` on, with loss scale 0. Sequences are
    assigned to microbatches and data ranks by their number alone, so a step reads the same set in every layout.
    Collective."""
    size, mesh = rig.config.parallel.microbatch_sequences, rig.mesh
    firsts = range(first + mesh.data_rank * size, first + sequences, mesh.data_ranks * size)
    tokens = [torch.from_numpy(source.sequences(n, size)).to(mesh.device) for n in firsts]
    if rig.config.data.mask == "none":
        return Batch(tokens, 0.0)
    numbers = [source.documents(n, size) for n in firsts]
    return Batch(tokens, 0.0, documents=_documents(rig, numbers, [_targets(rig, source, n, size) for n in firsts]))


def _documents(rig: Rig, numbers: list[Numbers], inside: list[list[NDArray[np.bool_]]]) -> list[Documents]:
    """All targets that are trained on have equal weights, such that the mean over the microbatches of all data ranks is
    the mean over these targets of the whole step, however they are distributed."""
    counts = np.sum([[each[0].size, *(same.sum() for same in each)] for each in inside], axis=0)
    everywhere = rig.mesh.sum(torch.from_numpy(counts).to(rig.mesh.device), "targets inside documents").tolist()
    weights = [everywhere[0] / max(count, 1) for count in everywhere[1:]]
    weighted = [[same * np.float32(weight) for same, weight in zip(of, weights, strict=True)] for of in inside]
    return [documents_of(each, of, rig.mesh.device) for each, of in zip(numbers, weighted, strict=True)]


def _targets(rig: Rig, source: SequenceSource, first: int, size: int) -> list[NDArray[np.bool_]]:
    """Which targets are in their token's document and trained on: bool [sequences, seq_len] each, for the next token
    and for every depth of MTP."""
    depths, length = 1 + rig.config.model.mtp_depth, rig.config.data.seq_len
    numbers = source.documents(first, size)
    inside = [same_document(numbers, ahead, depths) for ahead in range(1, depths + 1)]
    if isinstance(source, PartlyLearnt):
        learnt = source.learnt(first, size)
        inside = [same & learnt[:, ahead : ahead + length] for ahead, same in enumerate(inside, 1)]
    return inside


def repeated_batch(rig: Rig, microbatches: int, training: bool) -> Batch:
    """A batch of `microbatches` copies of the run's first microbatch, the same on every rank."""
    size, source = rig.config.parallel.microbatch_sequences, rig.data.train
    tokens = torch.from_numpy(source.sequences(0, size)).to(rig.mesh.device)
    batch = Batch([tokens] * microbatches, 1.0, training)
    if rig.config.data.mask == "none":
        return batch
    numbers = source.documents(0, size)
    documents = documents_of(
        numbers, [same.astype(np.float32) for same in _targets(rig, source, 0, size)], rig.mesh.device
    )
    return replace(batch, documents=[documents] * microbatches)
