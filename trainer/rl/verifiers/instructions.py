"""Whether an answer keeps instructions that can be checked without judgement, as in IFEval (arXiv 2311.07911).

Record: `checks`, a list of {"kind": ..., and the kind's own fields}; all must hold. A kind of one's own is a function
of the text and those fields, and a line in KINDS. Read is the answer's final part, or all of it if it has no tags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from dryvine.trainer.rl.verifiers.tags import final
from dryvine.trainer.rl.verifiers.verdict import Verdict

Check = Callable[..., bool]


def verify(answer: str, problem: Mapping[str, object]) -> Verdict:
    """1 or 0. Raises ValueError for a check that does not exist or lacks a field."""
    checks, text = problem.get("checks"), final(answer) if "<answer>" in answer else answer
    if not isinstance(checks, list) or not checks:
        raise ValueError(f"the problem's 'checks' is {checks!r}: a list of objects with a kind is needed")
    if text is None:
        return Verdict(0.0, "not exactly one <answer>...</answer>")
    broken = [check["kind"] for check in checks if not _holds(text, check)]
    return Verdict(float(not broken), f"not kept: {', '.join(broken)}" if broken else f"{len(checks)} kept")


def _holds(text: str, check: Mapping[str, object]) -> bool:
    kind = check.get("kind")
    if kind not in KINDS:
        raise ValueError(f"no check {kind!r}: there are {', '.join(KINDS)}")
    try:
        return KINDS[str(kind)](text, **{key: value for key, value in check.items() if key != "kind"})
    except TypeError as error:
        raise ValueError(f"check {kind}: {error}") from None


def _within(count: int, least: int = 0, most: int | None = None) -> bool:
    return least <= count and (most is None or count <= most)


def words(text: str, least: int = 0, most: int | None = None) -> bool:
    return _within(len(text.split()), least, most)


def sentences(text: str, least: int = 0, most: int | None = None) -> bool:
    return _within(len(re.findall(r"[^.!?。！？]*\w[^.!?。！？]*(?:[.!?。！？]+|$)", text)), least, most)


def paragraphs(text: str, least: int = 0, most: int | None = None) -> bool:
    return _within(sum(bool(part.strip()) for part in re.split(r"\n\s*\n", text)), least, most)


def bullets(text: str, least: int = 0, most: int | None = None) -> bool:
    return _within(len(re.findall(r"^\s*[-*•]\s+\S", text, re.MULTILINE)), least, most)


def placeholders(text: str, least: int = 0, most: int | None = None) -> bool:
    return _within(len(re.findall(r"\[[^\[\]]+\]", text)), least, most)


def keyword(text: str, word: str, least: int = 1, most: int | None = None) -> bool:
    """As a word of its own, in any case."""
    return _within(len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)), least, most)


def forbidden(text: str, words: Sequence[str]) -> bool:
    return not any(keyword(text, word) for word in words)


def letter(text: str, letter: str, least: int = 0, most: int | None = None) -> bool:
    return _within(text.lower().count(letter.lower()), least, most)


def upper_case(text: str) -> bool:
    return text.isupper()


def lower_case(text: str) -> bool:
    return text.islower()


def no_commas(text: str) -> bool:
    return not re.search("[,，、]", text)


def starts_with(text: str, beginning: str) -> bool:
    return text.strip().startswith(beginning)


def ends_with(text: str, ending: str) -> bool:
    return text.strip().endswith(ending)


def quoted(text: str) -> bool:
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == '"'


def title(text: str) -> bool:
    return bool(re.search(r"<<[^<>\n]*\S[^<>\n]*>>", text))


def is_json(text: str) -> bool:
    block = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)\n```\s*", text, re.DOTALL)
    try:
        json.loads(block[1] if block else text)
    except (ValueError, RecursionError):
        return False
    return True


KINDS: dict[str, Check] = {
    "words": words,
    "sentences": sentences,
    "paragraphs": paragraphs,
    "bullets": bullets,
    "placeholders": placeholders,
    "keyword": keyword,
    "forbidden": forbidden,
    "letter": letter,
    "upper_case": upper_case,
    "lower_case": lower_case,
    "no_commas": no_commas,
    "starts_with": starts_with,
    "ends_with": ends_with,
    "quoted": quoted,
    "title": title,
    "json": is_json,
}
