"""Conversations as a data source: packed into rows, each conversation a document of its own, with a loss on answers
only.

The source has the interface of pretraining's, so fine-tuning uses the same loop: schedules, checkpoints, resumes,
validation and layouts are already tested there. All conversations are held in memory, at five bytes a token: a set
of hundreds of thousands of long traces needs a machine with that much.

Legend: S sequences, L = seq_len + 1 + mtp_depth tokens of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dryvine.trainer.config import Config
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.identity import identify
from dryvine.trainer.data.order import SequenceOrder
from dryvine.trainer.data.splits import Data
from dryvine.trainer.rl.chat import BadConversation, Chat, Turns
from dryvine.trainer.rl.fitting import Fitted, fit
from dryvine.trainer.rl.lines import read_lines


class Conversations:
    """A `SequenceSource` that visits all rows in every epoch, in a new order each time."""

    def __init__(self, turns: list[Turns], seq_len: int, extra: int, seed: int) -> None:
        self.length = seq_len + extra
        self.starts = np.cumsum([0, *(len(one.tokens) for one in turns)])
        self._tokens = np.fromiter((t for one in turns for t in one.tokens), np.int32, self.starts[-1])
        self._learnt = np.fromiter((t for one in turns for t in one.learnt), np.bool_, self.starts[-1])
        # The last target of a row may lie behind its last input.
        places = fit([len(one.tokens) for one in turns], seq_len + 1)
        self.rows: list[list[tuple[int, Fitted]]] = [[] for _ in range(1 + max(place.row for place in places))]
        for number, place in enumerate(places):
            self.rows[place.row].append((number, place))
        self._order = SequenceOrder(seed, len(self.rows))

    def sequences(self, first: int, count: int, stride: int = 1) -> NDArray[np.int64]:
        """int64 [S, L]; 0 after the last conversation of a row."""
        return self._lines(self._tokens, first, count, stride).astype(np.int64)

    def learnt(self, first: int, count: int, stride: int = 1) -> NDArray[np.bool_]:
        """bool [S, L]: which of these tokens have a loss."""
        return self._lines(self._learnt, first, count, stride)

    def documents(self, first: int, count: int, stride: int = 1) -> NDArray[np.int64]:
        """int64 [S, L]: the number of each token's conversation in its row; the padding of a row has a number too."""
        out = np.zeros((count, self.length), np.int64)
        for line, row in zip(out, self._rows(first, count, stride), strict=True):
            for number, place in row:
                line[place.start + self._size(number) :] += 1
        return out

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self, start: int, length: int) -> NDArray[np.integer]:
        """`length` tokens from `start`, over all conversations end to end. Tokens with a loss are negative, so that the
        identity of the data covers the mask too."""
        part = slice(start, start + length)
        return np.where(self._learnt[part], -1 - self._tokens[part], self._tokens[part])

    def ends_between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where conversations end after `start` and before `stop`."""
        return self.starts[(self.starts > start) & (self.starts < stop)]

    def _rows(self, first: int, count: int, stride: int) -> Iterator[list[tuple[int, Fitted]]]:
        return (self.rows[self._order.window(first + i * stride)] for i in range(count))

    def _size(self, number: int) -> int:
        return int(self.starts[number + 1] - self.starts[number])

    def _lines(self, values: NDArray, first: int, count: int, stride: int) -> NDArray:
        out = np.zeros((count, self.length), values.dtype)
        for line, row in zip(out, self._rows(first, count, stride), strict=True):
            for number, place in row:
                part = values[self.starts[number] : self.starts[number + 1]]
                line[place.start : place.start + len(part)] = part
        return out


def open_conversations(config: Config) -> Data:
    """Both splits of `[sft]`. Raises DataError, which names every line that cannot be used."""
    assert config.sft is not None
    chat = Chat(config.sft.chat)
    if chat.vocabulary.size > config.data.vocab_size:
        raise DataError(
            f"data.vocab_size = {config.data.vocab_size}: {config.sft.chat.tokenizer} has {chat.vocabulary.size} "
            f"token ids; set data.vocab_size = {chat.vocabulary.size} or more"
        )
    train, validation = (
        Conversations(
            read(Path(path), chat, config.data.seq_len),
            config.data.seq_len,
            1 + config.model.mtp_depth,
            config.run.seed,
        )
        for path in (config.sft.train, config.sft.validation)
    )
    return Data(train, validation, identify((train, validation), chat.vocabulary.sha256))


def read(path: Path, chat: Chat, seq_len: int) -> list[Turns]:
    """The conversations of a file. Raises DataError with the numbers of all bad lines and the reasons for some."""
    return read_lines(path, lambda record: _turns(record, chat, seq_len), "conversations")


def _turns(record: object, chat: Chat, seq_len: int) -> Turns:
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise BadConversation('no object with a list "messages" of one or more')
    turns = chat.encode(messages)
    if not any(turns.learnt):
        raise BadConversation(f"has no message of the role {chat.config.answers!r}, which is what is learnt")
    if len(turns.tokens) > seq_len + 1:
        raise BadConversation(f"has {len(turns.tokens)} tokens, and data.seq_len + 1 are {seq_len + 1}")
    return turns
