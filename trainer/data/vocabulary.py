"""The first pass of a build: the folder's `tokenizer.json`, given or learned from a sample of the training text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dryvine.trainer.data import tokenizer
from dryvine.trainer.data.atomic import write_atomically
from dryvine.trainer.data.inputs import Input, reading
from dryvine.trainer.data.readers.table import kind_of
from dryvine.trainer.data.sampling import uniform
from dryvine.trainer.data.spec import BuildJob
from dryvine.trainer.data.stream import StreamPosition, read_stream

# The time to learn from a word is quadratic in its length: 12 s for one of 128 KiB, so a quarter of an hour for a line
# of base64 or DNA of 1 MiB. Cut into words of 4096, it takes seconds.
_LONG_WORD = re.compile(r"\S{4096}|\s{4096}")


def prepare_vocabulary(job: BuildJob) -> tokenizer.Vocabulary:
    """The vocabulary of this build. Its tokenizer.json is in the folder before the first token is."""
    path = job.folder / "tokenizer.json"
    if not path.exists():
        given = job.spec.tokenizer
        write_atomically(path, given.read_bytes().decode() if given else _learn(job))
    return tokenizer.load(path)


def _learn(job: BuildJob) -> str:
    assert job.spec.vocab_size, "a spec names a tokenizer or the size of one"
    return tokenizer.learn_tokenizer(_sample(job), job.spec.vocab_size).to_str(pretty=True)


def _sample(job: BuildJob) -> Iterator[str]:
    """About `sample_bytes` of training text, drawn evenly from all inputs."""
    fields = job.spec.fields
    text_bytes = sum(_text_bytes(file, fields.text) for file in job.inputs)
    rate = job.spec.sample_bytes / max(text_bytes, 1)
    for item in read_stream(job.inputs, fields, StreamPosition()):
        # The pieces of a large text share a key; their positions let each be drawn by itself.
        piece = item.key + f" {item.after.byte}".encode()
        if not job.spec.holds_out(item.key) and uniform("sample", piece) < rate:
            yield from _without_long_words(item.record.text)
        job.report("learning the vocabulary", item.after)


def _text_bytes(file: Input, field: str) -> int:
    with reading(file.path):
        return kind_of(file.path).text_bytes(file.path, field)


def _without_long_words(text: str) -> Iterator[str]:
    start = 0
    for word in _LONG_WORD.finditer(text):
        yield text[start : word.end()]
        start = word.end()
    yield text[start:]
