"""The share of words in the wanted language: R1's reward for thoughts that do not mix languages.

Record: `language`, an ISO 639-1 code. Words are told by their script alone, which needs no model and no dictionary, and
tells Chinese from English but not French from English: both are Latin. Numbers, formulas and blocks of code are in no
language. A Chinese or Japanese character is a word. Read are the thoughts, or the whole answer if it has none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache

from dryvine.trainer.rl.verifiers.tags import parts
from dryvine.trainer.rl.verifiers.verdict import Verdict

# As Unicode begins the names of letters.
_KANA = ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")
_OTHERS = {
    "ar": ("ARABIC",),
    "bg": ("CYRILLIC",),
    "el": ("GREEK",),
    "fa": ("ARABIC",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "ja": _KANA,
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "th": ("THAI",),
    "uk": ("CYRILLIC",),
    "zh": ("CJK",),
}
_LATIN = ("cs", "de", "en", "es", "fr", "id", "it", "nl", "pl", "pt", "tr", "vi")
SCRIPTS = _OTHERS | dict.fromkeys(_LATIN, ("LATIN",))
_FORMULA = re.compile(r"\$\$.*?\$\$|\$.*?\$|\\\(.*?\\\)|\\\[.*?\\\]|```.*?```|</?\w+>", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+")


def verify(answer: str, problem: Mapping[str, object]) -> Verdict:
    """0 to 1; 0 without a word."""
    code = problem.get("language")
    if code not in SCRIPTS:
        raise ValueError(f"the problem's 'language' is {code!r}: one of {', '.join(sorted(SCRIPTS))}")
    found = parts(answer)
    words = [word for run in _WORD.findall(_FORMULA.sub(" ", found[0] if found else answer)) for word in _words(run)]
    right = sum(_script(word[0]) in SCRIPTS[str(code)] for word in words)
    return Verdict(right / len(words) if words else 0.0, f"{right} of {len(words)} words are {code}")


def _words(run: str) -> list[str]:
    """A run of letters, cut where its script changes; characters of Chinese and kana one by one."""
    words: list[str] = []
    for character in run:
        script = _script(character)
        if words and script not in _KANA and script == _script(words[-1][0]):
            words[-1] += character
        else:
            words.append(character)
    return words


@lru_cache(maxsize=4096)
def _script(character: str) -> str:
    return unicodedata.name(character, "?").split(" ")[0]
