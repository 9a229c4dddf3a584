"""Exchanges by copy engine on streams that only wait for what they were told to (`support.races`): what is sent and
what arrives is ordered with the caller's work, and slots with the peer's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dryvine.comm.dispatch.backends import RING_SLOTS
from dryvine.comm.dispatch.copy_exchange import CopyExchange
from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.pending import Pending
from tests.support.peer_links import PeerLinks, PeerQueue
from tests.support.races import Event, Races

PIECE, ROWS = 64, 10  # 2 rows of 32 bytes a piece, so 5 pieces in rings of 4


class Peer(PeerLinks):
    def reached(self, word: int, value: int) -> Event:
        """When a word has this value."""
        number, credit = divmod(word, 2)
        slot, source = number // 4, number // 2 % 2
        start = (source * RING_SLOTS + slot) * PIECE
        with self.races.on(self.peer):
            if credit:  # of what this rank sent: the peer has emptied the slot
                self.peer.wait_event(self.writes[word - 1, value])
                self.memories[1][start : start + PIECE].sum()
            else:  # the flag of what the peer sends, for which it has waited for credit
                if value > 1:
                    self.peer.wait_event(self.writes[word + 1, value - 1])
                self.memories[0][start : start + PIECE].fill_(value)
        return self.peer.record_event()


def played() -> list[str]:
    """Faults of a few exchanges, each beside other work of the caller."""
    races = Races()
    exchange = CopyExchange(
        0, Peer(races, "writing", "reading"), PIECE, Meter(), ["self", "intra"], lambda *_: None, [0, 1]
    )
    with races:
        sent, into, result = (torch.zeros(ROWS + 2, 8) for _ in range(3))
        for number in range(3):
            sent.fill_(number)
            pending = exchange.start(sent, (2, ROWS), (2, ROWS), into)
            result.add_(1)
            result.copy_(pending.wait())
    return list(races.found)


def test_exchanges_are_ordered_with_the_caller_and_the_peer() -> None:
    assert played() == []


@pytest.mark.parametrize(
    ("name", "broken", "words"),
    [
        ("after_caller", lambda queue: None, "in writing does not wait for compute"),
        ("write", PeerQueue.write_at_once, "in peer does not wait for writing"),
        ("wait", PeerQueue.look, "in reading does not wait for peer"),
        ("here", lambda queue: Pending.done(None), "in compute does not wait for reading"),
    ],
    ids=["sent before it is made", "flag before its data", "read before it is here", "used before it is read"],
)
def test_a_missing_wait_is_found(monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, words: str) -> None:
    monkeypatch.setattr(PeerQueue, name, broken)
    assert any(words in fault for fault in played()), played()
