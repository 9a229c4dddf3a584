"""Messages of replayed graphs, on streams that only wait for what they were told to (`support.races`): what a replay
writes and reads is ordered with the copies of this rank and of its peer."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from dryvine.comm.dispatch.backends import WINDOW_SLOTS
from dryvine.comm.dispatch.by_rank import ByRank
from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.dispatch.windows import WindowRows, Windows
from dryvine.comm.live_steps import LiveStep
from tests.support.peer_links import PeerLinks, PeerQueue
from tests.support.races import Event, Races

ROOM = WindowRows(4, (8,), torch.float32)


class Word(NamedTuple):
    """What a word of `Windows` says, by its number."""

    credit: bool
    slot: int
    source: int

    @staticmethod
    def of(number: int) -> Word:
        flag, credit = divmod(number, 2)
        return Word(bool(credit), flag // 4, flag // 2 % 2)


class Peer(PeerLinks):
    def reached(self, number: int, value: int) -> Event:
        """When a word has this value."""
        word = Word.of(number)
        if word.source == 0 and not word.credit:
            return self.writes[number, value]  # this rank's flag
        start = word.slot * ROOM.bytes(2)
        with self.races.on(self.peer):
            if word.credit:  # of what this rank sent: the peer has read it
                self.peer.wait_event(self.writes[number - 1, value])
                ROOM.view(self.memories[1], start, 2).sum()
            else:  # the flag of what the peer sends, for which it has waited for credit
                if value > 1:
                    self.peer.wait_event(self.writes[number + 1, value - 1])
                ROOM.view(self.memories[0], start, 2).fill_(value)
        return self.peer.record_event()


def replayed() -> list[str]:
    """Faults of one recorded message, replayed some turns of its slot beside another that is sent at once."""
    races = Races()
    windows = Windows(0, Peer(races, "copies"), ROOM.bytes(2), Meter(), ["self", "intra"], lambda *_: None, [0, 1])
    with races:
        sent, result = torch.zeros(4, 8), torch.zeros(4, 8)
        steps: list[LiveStep] = []
        with windows.live.recorded_by(steps.append):
            came: ByRank = windows.start(lambda _: (sent,), (ROOM,), lambda came: came[0], "recorded").wait()
        post, wait, release = steps
        for number in range(2 * WINDOW_SLOTS + 1):
            sent.fill_(number)
            post.run()
            other = windows.start(
                lambda _, n=number: (torch.full((4, 8), float(n)),), (ROOM,), lambda came: came[0].window[1] + 1, "now"
            )
            wait.run()
            result.copy_(came.window[1] + sent)
            release.run()
            other.wait()
    return list(races.found)


def test_replays_are_ordered_with_copies() -> None:
    assert replayed() == []


@pytest.mark.parametrize(
    ("name", "broken", "words"),
    [
        ("after_caller", lambda queue: None, "in copies does not wait for compute"),
        ("write", PeerQueue.write_at_once, "writes over what compute may still read"),
        ("wait", PeerQueue.look, "in compute does not wait for peer"),
    ],
    ids=["sent before it is made", "given back before it is read", "read before it is here"],
)
def test_a_missing_wait_is_found(monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, words: str) -> None:
    monkeypatch.setattr(PeerQueue, name, broken)
    assert any(words in fault for fault in replayed()), replayed()


def test_what_was_sent_is_not_written_before_it_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for what comes says nothing of it."""
    plain = Windows._words_of
    monkeypatch.setattr(Windows, "_words_of", lambda *given: plain(*given)._replace(done=plain(*given).done[:1]))
    assert any("in compute writes over what copies may still read" in fault for fault in replayed())
