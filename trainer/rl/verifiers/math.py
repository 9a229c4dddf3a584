r"""Whether the answer equals the problem's, as mathematics, by math-verify (`pip install dryvine[rl]`).

Record: `answer`, LaTeX or a plain number. The answer is what stands in the only <answer>...</answer>, else in the only
\boxed{...}; in both: the boxed part. Left to itself, math-verify takes the last thing in a text that looks like a
number, so that "I guess 1, 2, 3, 4, 5", `1=2=3=4=5` and `5%` are all right for 5. Here exactly one expression may
stand there, no list, chain of equations or percentage that the reference has not, and repairs of malformed LaTeX are
off. Plain text goes the way of LaTeX too, since the library evaluates it as Python otherwise.

It must run in a process of its own: the library's time limits are alarms, which off the main thread raise errors or,
switched off there, leave `9^{9^{9^9}}` to run for ever.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse
from math_verify import verify as equal

from dryvine.trainer.rl.verifiers.tags import final
from dryvine.trainer.rl.verifiers.verdict import Verdict

SECONDS = 10.0  # of the pool's clock, which ends what the library's own does not
_LIBRARY_SECONDS = 3
_LONGEST = 2000  # characters of an expression
_SEVERAL = ("=", "%", ",", ";", " or ", " and ")  # signs of a list, a chain or another unit
_SEPARATED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")  # 1,000,000
_STRICT = LatexExtractionConfig(
    try_extract_without_anchor=False,
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=False, nits=False, boxed="all", equations=False
    ),
)


def verify(answer: str, problem: Mapping[str, object]) -> Verdict:
    """1 or 0. Raises ValueError where the problem's own answer is no expression."""
    wanted = str(problem.get("answer", ""))
    gold = _parsed(_plain(boxed(wanted) or wanted))
    if not gold:
        raise ValueError(f"the problem's 'answer' is {wanted!r}: no expression")
    inner = final(answer) if "<answer>" in answer else answer
    found = inner if inner is None else boxed(inner) if "\\boxed" in inner or inner is answer else inner
    if found is None or not found.strip() or len(found) > _LONGEST:
        return Verdict(0.0, "not exactly one expression in <answer>...</answer> or \\boxed{...}")
    found, wanted = _plain(found), _plain(wanted)
    if extra := [sign for sign in _SEVERAL if found.count(sign) > wanted.count(sign)]:
        return Verdict(0.0, f"{extra[0]!r} is in the answer and not in the reference")
    return Verdict(float(equal(gold, _parsed(found), timeout_seconds=_LIBRARY_SECONDS)), f"{found[:80]!r}")


def boxed(text: str) -> str | None:
    r"""The inside of the only \boxed{...} of a text, by counting braces; None where there are several or none."""
    before, opened, rest = text.partition("\\boxed{")
    if not opened or "\\boxed" in before + rest:
        return None
    depth = 1
    for at, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:at]
    return None


def _plain(expression: str) -> str:
    """Without thin spaces and, in a number alone, commas between thousands."""
    text = expression.replace("\\,", " ").replace("\\!", "").strip(" $")
    return text.replace(",", "") if _SEPARATED.fullmatch(text) else text


def _parsed(expression: str) -> list[object]:
    found: list[object] = parse(
        f"\\boxed{{{expression}}}", [_STRICT], fallback_mode="no_fallback", parsing_timeout=_LIBRARY_SECONDS
    )
    return found
