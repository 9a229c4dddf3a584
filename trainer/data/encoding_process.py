"""A process that tokenizes: `python -m dryvine.trainer.data.encoding_process FD`, started by `encoded.py`.

FD is a pipe. It receives the tokenizer as JSON and the dtype of its ids, then one batch after another; for each it
sends back the tokens, or the exception. It ends when the pipe closes.
"""

from __future__ import annotations

import queue
import sys
import threading
from array import array
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

from tokenizers import Tokenizer

from dryvine.trainer.data.encoding import Encoder, ItemText

# A call of `tokenizers` keeps a hundred bytes for each token until its last text is done. With less text in each,
# they stay in the processor's cache.
CALL_CHARACTERS = 2**17

Batch = Sequence[ItemText]


def main() -> None:
    pipe = Connection(int(sys.argv[1]))
    tokenizer, typecode = pipe.recv()
    encoder = Encoder.of(Tokenizer.from_str(tokenizer))
    arrived: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
    # Read while encoding: else both ends could block in send, each waiting for the other to receive.
    threading.Thread(target=_read, args=(pipe, arrived), daemon=True).start()
    while (batch := arrived.get()) is not None:
        try:
            answer: list[array[int]] | Exception = _encode(encoder, batch, typecode)
        except Exception as error:  # raised again in the build
            answer = error
        try:
            pipe.send(answer)
        except OSError:  # the build has ended
            return


def _read(pipe: Connection, arrived: queue.SimpleQueue[Batch | None]) -> None:
    try:
        while True:
            arrived.put(pipe.recv())
    except (EOFError, OSError):
        arrived.put(None)


def _encode(encoder: Encoder, batch: Batch, typecode: str) -> list[array[int]]:
    return [tokens for texts in _calls(batch) for tokens in encoder.tokens_of(texts, typecode)]


def _calls(batch: Batch) -> Iterator[Batch]:
    """The batch in pieces of about CALL_CHARACTERS."""
    texts: list[ItemText] = []
    size = 0
    for text in batch:
        texts.append(text)
        size += sum(len(part.text) for part in text.parts)
        if size >= CALL_CHARACTERS:
            yield texts
            texts, size = [], 0
    yield texts


if __name__ == "__main__":
    main()
