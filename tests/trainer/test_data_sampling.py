"""Decisions by hash: pinned, since a resumed build repeats them; even, and independent of each other."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest

from dryvine.trainer.data.encoding import TextPart
from dryvine.trainer.data.fim import rearrange
from dryvine.trainer.data.sampling import uniform
from dryvine.trainer.data.spec import BuildSpec

KEYS = [f"document {i}".encode() for i in range(4000)]
MARKERS = (1, 2, 3)


def cuts(text: str) -> list[tuple[int, int]]:
    """Where each document is cut when all are."""
    parts = [rearrange(text, key, 1.0, MARKERS) for key in KEYS]
    return [(len(prefix.text), len(prefix.text) + len(middle.text)) for prefix, _, middle in parts]


def test_the_numbers_never_change() -> None:
    assert uniform("split", b"x") == 0.447758022658855
    assert BuildSpec(vocab_size=300, validation_fraction=0.448).holds_out(b"x")
    assert not BuildSpec(vocab_size=300, validation_fraction=0.447).holds_out(b"x")


@pytest.mark.parametrize("purpose", ["split", "sample", "fim", "cut", "other cut"])
def test_numbers_are_even_over_their_range(purpose: str) -> None:
    numbers = sorted(uniform(purpose, key) for key in KEYS)
    assert max(abs(number - i / len(KEYS)) for i, number in enumerate(numbers)) < 1.63 / len(KEYS) ** 0.5


def test_purposes_are_independent() -> None:
    purposes = ("split", "sample", "fim", "cut", "other cut")
    numbers = [[uniform(purpose, key) for key in KEYS] for purpose in purposes]
    pairs = [(a, b) for i, a in enumerate(numbers) for b in numbers[:i]]
    assert max(abs(statistics.correlation(a, b)) for a, b in pairs) < 4 / len(KEYS) ** 0.5


def test_cuts_are_anywhere_and_independent_of_whether_a_document_is_cut() -> None:
    """Two even cuts in order lie at a third and two thirds; the middle is a third of the text."""
    both = cuts("x" * 300)
    assert abs(statistics.mean(first for first, _ in both) - 100) < 5
    assert abs(statistics.mean(second for _, second in both) - 200) < 5
    assert {first for first, _ in both} | {second for _, second in both} == set(range(301))
    drawn = [len(rearrange("x" * 300, key, 0.2, MARKERS)[0].text) for key in KEYS if uniform("fim", key) < 0.2]
    assert abs(statistics.mean(drawn) - 100) < 10


def test_a_single_letter_may_be_prefix_suffix_or_middle() -> None:
    both = cuts("x")
    share = {cut: both.count(cut) / len(both) for cut in ((0, 0), (0, 1), (1, 1))}
    assert share == pytest.approx({(0, 0): 0.25, (0, 1): 0.5, (1, 1): 0.25}, abs=0.04)


@pytest.mark.parametrize("text", ["a", "ab", "some text of a document"])
def test_the_parts_are_the_document_each_end_of_it_at_one_part(text: str) -> None:
    for key in KEYS[:200]:
        prefix, suffix, middle = rearrange(text, key, 1.0, MARKERS)
        assert (prefix.marker, suffix.marker, middle.marker) == MARKERS
        order = (prefix, middle, suffix)
        assert "".join(part.text for part in order) == text
        assert_ends(order, lambda part: part.starts)
        assert_ends(order[::-1], lambda part: part.ends)


def assert_ends(order: tuple[TextPart, ...], at_end: Callable[[TextPart], bool]) -> None:
    """Of the parts that hold text, the first and no other is at the end."""
    assert [at_end(part) for part in order if part.text] == [True, False, False][: sum(bool(p.text) for p in order)]


def test_rates() -> None:
    assert all(len(rearrange("text", key, 0.0, MARKERS)) == 1 for key in KEYS)
    assert all(rearrange("text", key, 1.0, None) == (TextPart(None, "text"),) for key in KEYS[:9])
    assert abs(sum(len(rearrange("text", key, 0.1, MARKERS)) == 3 for key in KEYS) / len(KEYS) - 0.1) < 0.02
