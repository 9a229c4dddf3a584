"""Batches of the stream to batches of tokens: in this process, or in several that have a tokenizer each.

Batch i goes to process i modulo their number, and results are taken in that order, so the dataset is the same to the
byte for any number. Each process shares one pipe with the build. It closes when either end dies: a killed build leaves
no process behind, and a killed process (out of memory, say) ends the build with its name. A pool of
`concurrent.futures` waits forever in the first case and needs its tokenizer in a global. The threads inside
`tokenizers` also use all cores, but between its calls one thread alone reads, hashes and writes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dryvine.trainer.data import tokenizer
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import dtype_for
from dryvine.trainer.data.encoding import TextPart
from dryvine.trainer.data.fim import rearrange
from dryvine.trainer.data.readers.record import Broken
from dryvine.trainer.data.spec import BuildSpec
from dryvine.trainer.data.stream import StreamItem, StreamPosition
from dryvine.trainer.data.tokenizer import Vocabulary

_AHEAD = 2  # batches that a process has: one in progress, and one so that it never waits


class Encoded(NamedTuple):
    """A stream item with its text as tokens. `ids` is empty if it held only broken lines."""

    after: StreamPosition
    name: str
    broken: tuple[Broken, ...]
    ids: NDArray[np.unsignedinteger]
    size: int  # bytes of the text
    ends: bool  # a document ends here, and its end token is the last of `ids`
    held_out: bool  # in the validation split


Encode = Callable[[Iterable[Sequence[StreamItem]]], Iterator[list[Encoded]]]


def encode_batch(items: Sequence[StreamItem], spec: BuildSpec, vocabulary: Vocabulary) -> list[Encoded]:
    """Tokenize a batch in one call, and give each document its end token."""
    arranged = [_parts(item, spec, vocabulary) for item in items]
    tokens = iter(vocabulary.encode([part for parts in arranged for part in parts]))
    dtype, out = dtype_for(vocabulary.size), []
    for item, parts in zip(items, arranged, strict=True):
        ids: list[int] = []
        for marker, *_ in parts:
            ids += ([] if marker is None else [marker]) + next(tokens)
        ends = bool(parts) and item.record.ends
        array = np.array(ids + [vocabulary.end] * ends, dtype)
        held_out = spec.holds_out(item.key)
        out.append(Encoded(item.after, item.name, item.record.broken, array, item.size, ends, held_out))
    return out


def _parts(item: StreamItem, spec: BuildSpec, vocabulary: Vocabulary) -> tuple[TextPart, ...]:
    """The text that an item adds to its document; nothing for broken lines only. Validation text is never
    rearranged."""
    record = item.record
    is_whole = record.starts and record.ends
    if is_whole and not record.text:
        return ()
    if not is_whole or spec.holds_out(item.key):
        return (TextPart(None, record.text, record.starts, record.ends),)
    return rearrange(record.text, item.key, spec.fim_rate, vocabulary.fim)


@contextmanager
def encoding(spec: BuildSpec, tokenizer_json: Path, vocabulary: Vocabulary, processes: int) -> Iterator[Encode]:
    """A function from batches to encoded batches, in order. At most two batches for each process are read ahead."""
    if processes == 1:
        yield lambda batches: (encode_batch(batch, spec, vocabulary) for batch in batches)
        return
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(spec, tokenizer_json)) for _ in range(processes)]
        yield lambda batches: _in_turn(batches, workers)


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection

    def send(self, batch: Sequence[StreamItem]) -> None:
        try:
            self.pipe.send(batch)
        except OSError:
            raise self._ended() from None

    def receive(self) -> list[Encoded]:
        try:
            answer: list[Encoded] | Exception = self.pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ended(self) -> DataError:
        self.process.join(10)
        return DataError(
            f"a tokenizing process ended with exit code {self.process.exitcode} (-9: killed, as when memory runs out); "
            "the same command continues after the last whole shard, with fewer --processes if memory is short"
        )


@contextmanager
def _worker(spec: BuildSpec, tokenizer_json: Path) -> Iterator[_Worker]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, spec, tokenizer_json), daemon=True)
    process.start()
    theirs.close()
    try:
        yield _Worker(process, ours)
    finally:
        ours.close()  # which ends the process
        process.join(10)


def _in_turn(batches: Iterable[Sequence[StreamItem]], workers: Sequence[_Worker]) -> Iterator[list[Encoded]]:
    senders, receivers = itertools.cycle(workers), itertools.cycle(workers)
    waiting = 0
    for batch in batches:
        next(senders).send(batch)
        waiting += 1
        if waiting == _AHEAD * len(workers):
            yield next(receivers).receive()
            waiting -= 1
    for _ in range(waiting):
        yield next(receivers).receive()


def _serve(pipe: Connection, spec: BuildSpec, tokenizer_json: Path) -> None:
    """The loop of a process: encode batches until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the build reports it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    vocabulary = tokenizer.load(tokenizer_json)
    arrived: queue.SimpleQueue[Sequence[StreamItem] | None] = queue.SimpleQueue()
    # Read while encoding: else both ends could block in send, each waiting for the other to receive.
    threading.Thread(target=_read, args=(pipe, arrived), daemon=True).start()
    while (batch := arrived.get()) is not None:
        try:
            answer: list[Encoded] | Exception = encode_batch(batch, spec, vocabulary)
        except Exception as error:  # raised again in the build
            answer = error
        try:
            pipe.send(answer)
        except OSError:  # the build has ended
            return


def _read(pipe: Connection, arrived: queue.SimpleQueue[Sequence[StreamItem] | None]) -> None:
    try:
        while True:
            arrived.put(pipe.recv())
    except (EOFError, OSError):
        arrived.put(None)
