"""The second pass of a build: tokenizes every document and appends it to its split, shard after shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dryvine.trainer.data.dataset import dtype_for
from dryvine.trainer.data.encoding import TextPart
from dryvine.trainer.data.fim import rearrange
from dryvine.trainer.data.progress import BuildProgress
from dryvine.trainer.data.shards import PartWriter
from dryvine.trainer.data.spec import BuildJob, BuildSpec
from dryvine.trainer.data.stream import StreamItem, StreamPosition, batches, read_stream
from dryvine.trainer.data.tokenizer import Vocabulary


def pack(job: BuildJob, vocabulary: Vocabulary, progress: BuildProgress) -> BuildProgress:
    """Pack all text from where `progress` left off, and commit a part whenever enough tokens have been written."""
    work = batches(read_stream(job.inputs, job.spec.field, progress.place))
    while progress.place.file < len(job.inputs):
        with PartWriter(job.folder, progress, dtype_for(vocabulary.size)) as part:
            progress = part.commit(_fill(part, work, job, vocabulary))
    return progress


def _fill(part: PartWriter, work: Iterator[list[StreamItem]], job: BuildJob, vocabulary: Vocabulary) -> StreamPosition:
    """Add batches to a part until it has `shard_tokens`. Returns the position behind the last one."""
    for batch in work:
        _add(batch, part, job.spec, vocabulary)
        job.report("tokenizing", batch[-1].after)
        if part.tokens >= job.spec.shard_tokens:
            return batch[-1].after
    return StreamPosition(len(job.inputs))


def _add(batch: Sequence[StreamItem], part: PartWriter, spec: BuildSpec, vocabulary: Vocabulary) -> None:
    """Tokenize a batch in one call, over all cores, and add each document with its end token to its split."""
    arranged = [_parts(item, spec, vocabulary) for item in batch]
    encoded = iter(vocabulary.encode([part for parts in arranged for part in parts]))
    for item, parts in zip(batch, arranged, strict=True):
        part.quarantine(item)
        ids: list[int] = []
        for marker, *_ in parts:
            ids += ([] if marker is None else [marker]) + next(encoded)
        if parts:
            ends = item.record.ends
            shard = part.val if spec.holds_out(item.key) else part.train
            shard.add(ids + [vocabulary.end] * ends, item.size, ends)


def _parts(item: StreamItem, spec: BuildSpec, vocabulary: Vocabulary) -> tuple[TextPart, ...]:
    """What an item adds to its document: nothing if it holds only broken lines. Validation text is never rearranged."""
    record = item.record
    is_whole = record.starts and record.ends
    if is_whole and not record.text:
        return ()
    if not is_whole or spec.holds_out(item.key):
        return (TextPart(None, record.text, record.starts, record.ends),)
    return rearrange(record.text, item.key, spec.fim_rate, vocabulary.fim)
