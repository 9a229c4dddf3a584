"""Tokenises batches of the document stream: in this process, or in several processes with a tokenizer each.

Batch i is sent to process i modulo the number of processes, and results are received in that order, so the dataset is
bytewise equal for any number. Each process has a pipe to the build, which closes when either end dies: a killed build
leaves no process behind, and a killed process (for example out of memory) ends the build with its name. A pool of
`concurrent.futures` waits forever in the first case; `multiprocessing` runs the imports of the main program in every
process, which takes a second. The threads inside `tokenizers` also use all cores, but between its calls a single thread
reads, hashes and writes.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import dtype_for
from dryvine.trainer.data.encoding import ItemText, TextPart
from dryvine.trainer.data.fim import rearrange
from dryvine.trainer.data.readers.record import Broken
from dryvine.trainer.data.spec import BuildSpec
from dryvine.trainer.data.stream import StreamItem, StreamPosition
from dryvine.trainer.data.tokenizer import Vocabulary

_AHEAD = 2  # batches that a process has: one in progress, and one so that it never waits
_NONE = np.zeros(0, np.uint16)


class Encoded(NamedTuple):
    """A tokenised stream item. `ids` is empty if it contained only broken lines."""

    after: StreamPosition
    name: str
    broken: tuple[Broken, ...]
    ids: NDArray[np.unsignedinteger]
    size: int  # bytes of the text
    ends: bool  # the item is the last of its document, and its last id is the end token
    held_out: bool  # in the validation split


Encode = Callable[[Iterable[Sequence[StreamItem]]], Iterator[list[Encoded]]]


class _Planned(NamedTuple):
    """A batch before encoding: its texts, and the remaining fields of its items."""

    texts: list[ItemText]
    items: list[Encoded]  # without ids

    def with_tokens(self, tokens: Iterable[array[int]]) -> list[Encoded]:
        return [item._replace(ids=np.asarray(ids)) for item, ids in zip(self.items, tokens, strict=True)]


class _Plan(NamedTuple):
    """The settings on which the tokens of an item depend, besides its text."""

    spec: BuildSpec
    vocabulary: Vocabulary

    @property
    def typecode(self) -> str:
        """The typecode of `array` that holds all token ids."""
        return np.dtype(dtype_for(self.vocabulary.size)).char

    def batch(self, items: Sequence[StreamItem]) -> _Planned:
        texts, without_ids = zip(*map(self._item, items), strict=True)
        return _Planned([*texts], [*without_ids])

    def _item(self, item: StreamItem) -> tuple[ItemText, Encoded]:
        held_out = self.spec.holds_out(item.key)
        parts = self._parts(item, held_out)
        ends = bool(parts) and item.record.ends
        encoded = Encoded(item.after, item.name, item.record.broken, _NONE, item.size, ends, held_out)
        return ItemText(parts, self.vocabulary.end if ends else None), encoded

    def _parts(self, item: StreamItem, held_out: bool) -> tuple[TextPart, ...]:
        """The parts of an item's text in training order; none if it contains only broken lines. Validation text is
        never rearranged."""
        record = item.record
        is_whole = record.starts and record.ends
        if is_whole and not record.text:
            return ()
        if not is_whole or held_out:
            return (TextPart(None, record.text, record.starts, record.ends),)
        return rearrange(record.text, item.key, self.spec.fim_rate, self.vocabulary.fim)


def encode_batch(items: Sequence[StreamItem], spec: BuildSpec, vocabulary: Vocabulary) -> list[Encoded]:
    """Tokenise a batch in one call, on all cores, and append the end token to each document."""
    plan = _Plan(spec, vocabulary)
    planned = plan.batch(items)
    return planned.with_tokens(vocabulary.encoder.tokens_of(planned.texts, plan.typecode))


@contextmanager
def encoding(spec: BuildSpec, vocabulary: Vocabulary, processes: int) -> Iterator[Encode]:
    """A function from batches to encoded batches, in order. At most two batches per process are read ahead."""
    if processes == 1:
        yield lambda batches: (encode_batch(batch, spec, vocabulary) for batch in batches)
        return
    plan = _Plan(spec, vocabulary)
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(plan)) for _ in range(processes)]
        yield lambda batches: _in_turn(map(plan.batch, batches), workers)


class _Worker(NamedTuple):
    process: subprocess.Popen[bytes]
    pipe: Connection

    def send(self, message: object) -> None:
        try:
            self.pipe.send(message)
        except OSError:
            raise self._ended() from None

    def receive(self) -> list[array[int]]:
        try:
            answer: list[array[int]] | Exception = self.pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ended(self) -> DataError:
        self.process.kill()  # which changes nothing if it has ended
        return DataError(
            f"a tokenizing process ended with exit code {self.process.wait()} (-9: killed, as when memory runs out); "
            "the same command continues after the last whole shard, with fewer --processes if memory is short"
        )


@contextmanager
def _worker(plan: _Plan) -> Iterator[_Worker]:
    ours, theirs = socket.socketpair()
    words = [sys.executable, "-P", "-m", "dryvine.trainer.data.encoding_process", str(theirs.fileno())]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    # Ctrl-C does not reach it in a process group of its own; the build reports it.
    process = subprocess.Popen(words, env=environment, pass_fds=(theirs.fileno(),), process_group=0)
    theirs.close()
    worker = _Worker(process, Connection(ours.detach()))
    try:
        worker.send((plan.vocabulary.tokenizer.to_str(), plan.typecode))
        yield worker
    finally:
        worker.pipe.close()
        process.kill()
        process.wait()


def _in_turn(batches: Iterable[_Planned], workers: Sequence[_Worker]) -> Iterator[list[Encoded]]:
    senders, receivers = itertools.cycle(workers), itertools.cycle(workers)
    sent: deque[_Planned] = deque()
    for batch in batches:
        next(senders).send(batch.texts)
        sent.append(batch._replace(texts=[]))
        if len(sent) == _AHEAD * len(workers):
            yield sent.popleft().with_tokens(next(receivers).receive())
    while sent:
        yield sent.popleft().with_tokens(next(receivers).receive())
