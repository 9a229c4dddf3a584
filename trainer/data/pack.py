"""The second pass of a build: tokenizes every document and appends it to its split, shard after shard."""

from __future__ import annotations

from collections.abc import Iterator

from dryvine.trainer.data.encoded import Encoded, encoding
from dryvine.trainer.data.progress import BuildProgress
from dryvine.trainer.data.shards import PartWriter
from dryvine.trainer.data.spec import BuildJob
from dryvine.trainer.data.stream import StreamPosition, batches, read_stream
from dryvine.trainer.data.tokenizer import Vocabulary


def pack(job: BuildJob, vocabulary: Vocabulary, progress: BuildProgress) -> BuildProgress:
    """Pack all text from where `progress` left off, and commit a part whenever enough tokens have been written."""
    work = batches(read_stream(job.inputs, job.spec.fields, progress.place))
    with encoding(job.spec, vocabulary, job.processes) as encode:
        encoded = encode(work)
        while progress.place.file < len(job.inputs):
            with PartWriter(job.folder, progress) as part:
                progress = part.commit(_fill(part, encoded, job))
    return progress


def _fill(part: PartWriter, encoded: Iterator[list[Encoded]], job: BuildJob) -> StreamPosition:
    """Add batches to a part until it has `shard_tokens`. Returns the position behind the last one."""
    for batch in encoded:
        for item in batch:
            part.add(item)
        job.report("tokenizing", batch[-1].after)
        if part.tokens >= job.spec.shard_tokens:
            return batch[-1].after
    return StreamPosition(len(job.inputs))
