"""Verifiers of text: right answers score, tricks do not, and records that cannot be used raise."""

from __future__ import annotations

import importlib

import pytest

from dryvine.trainer.rl.verifiers.arithmetic import NotArithmetic, evaluate
from dryvine.trainer.rl.verifiers.length import soft_overlong
from dryvine.trainer.rl.verifiers.names import VERIFIERS

SPOKEN = "<think>a</think><answer>{}</answer>"
PUZZLE = {"numbers": [3, 5, 7], "target": 26}


def score(verifier: str, text: str, /, **problem: object) -> float | None:
    found: float | None = importlib.import_module(VERIFIERS[verifier]).verify(text, problem).score
    return found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("2-3-4", -5),
        ("-(2-3)*-4", -4),
        ("24/4/2", 3),
        (" 1 2 ", 12),
        ("--5", 5),
        ("0/7", 0),
    ],
)
def test_arithmetic(text: str, value: int) -> None:
    assert evaluate(text)[0] == value == eval(text.replace(" ", "").replace("/", "//"))


def test_left_to_right() -> None:
    assert evaluate("7+5*9", left_to_right=True) == (108, [7, 5, 9])
    assert evaluate("7+5*9") == (52, [7, 5, 9])


@pytest.mark.parametrize(
    "text",
    [
        "", "+", "5-", "(5", "5)", "()", "2**3", "7//2", "7/2", "1/0", "5%2", "1e3", "0x10", "1_000", "٣+٤", "²", "½",
        "5!", "abs(5)", "__import__('os')", "9**9**9**9", "10000000000*1000000000", "1" * 20, "(" * 60 + "1" + ")" * 60,
        "-" * 60 + "1", "1+" * 600 + "1", "5;6", "5,6", "5=5", "x",
    ],
)  # fmt: skip
def test_what_is_no_arithmetic_raises(text: str) -> None:
    with pytest.raises(NotArithmetic):
        evaluate(text)


@pytest.mark.parametrize(
    ("answer", "points"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("\n<think>a\nb</think>\n\n<answer>\nb</answer>\n", 1),
        ("<think></think><answer>b</answer>", 0),
        ("<think>a</think><answer> </answer>", 0),
        ("<think>a</think><answer>b</answer> more", 0),
        ("<think>a</think> so <answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a<think>b</think></think><answer>c</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think><answer>a</answer></think><answer>b</answer>", 0),
        ("<think>a</think><answer>b", 0),
        ("<THINK>a</THINK><ANSWER>b</ANSWER>", 0),
        ("", 0),
    ],
)
def test_format(answer: str, points: float) -> None:
    assert score("format", answer) == points


@pytest.mark.parametrize(
    ("expression", "points"),
    [
        ("3*7+5", 1),
        ("5+7*3", 1),
        ("5 + 3*7", 1),
        ("3*7+5+0", 0),
        ("26", 0),
        ("3*7", 0),
        ("3*7+5=26", 0),
        ("3*7+5, 26", 0),
    ],
)
def test_countdown(expression: str, points: float) -> None:
    assert score("countdown", SPOKEN.format(expression), **PUZZLE) == points


@pytest.mark.parametrize(("expression", "target"), [("3*7", 21), ("7+7+7+5", 26), ("3*3*5*7", 315)])
def test_countdown_uses_each_number_once(expression: str, target: int) -> None:
    assert score("countdown", SPOKEN.format(expression), **{**PUZZLE, "target": target}) == 0


def test_countdown_reads_one_answer_and_takes_one_reading_of_it() -> None:
    right = SPOKEN.format("3*7+5")
    assert score("countdown", right + right, **PUZZLE) == 0
    assert score("countdown", right.replace("answer", "ANSWER"), **PUZZLE) == 0
    assert score("countdown", SPOKEN.format("3+5*7"), **{**PUZZLE, "target": 56}) == 0
    assert score("countdown", SPOKEN.format("3+5*7"), **PUZZLE, left_to_right=True) == 0
    assert score("countdown", SPOKEN.format("3+5*7"), **{**PUZZLE, "target": 56}, left_to_right=True) == 1


def test_integer() -> None:
    assert score("integer", SPOKEN.format("12*7"), answer=84) == 1
    assert score("integer", SPOKEN.format("-84"), answer=84) == 0
    assert score("integer", "84", answer=84) == 0


@pytest.mark.parametrize(
    ("wanted", "answer", "points"),
    [
        ("5", r"so \boxed{5}", 1),
        ("5", "<answer>5</answer>", 1),
        ("5", r"<think>\boxed{4}</think><answer>\boxed{5}</answer>", 1),
        ("5", r"<answer>\frac{10}{2}</answer>", 1),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1),
        ("$\\frac{3}{4}$", "<answer>3/4</answer>", 1),
        (r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{1}{\sqrt{2}}}", 1),
        ("x^2+2x+1", r"\boxed{(x+1)^2}", 1),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", 1),
        ("1,234", "<answer>1234</answer>", 1),
        ("1000000", r"\boxed{1,000,000}", 1),
        ("12", r"\boxed{12\,\text{cm}}", 1),
        ("5", "<answer>6</answer>", 0),
        ("5", "<answer>5%</answer>", 0),
        ("5", "<answer>5 or 6</answer>", 0),
        ("5", "I guess 1, 2, 3, 4, 5", 0),
        ("5", "<answer>1=2=3=4=5</answer>", 0),
        ("5", r"\boxed{4} \boxed{5}", 0),
        ("5", r"\boxed{5} \boxed{6}", 0),
        ("5", r"\boxed{5,6}", 0),
        ("5", "<answer>4</answer><answer>5</answer>", 0),
        ("5", r"\boxed{5", 0),
        ("5", "<answer>five</answer>", 0),
        ("5", "<answer></answer>", 0),
        ("5", "<answer>(lambda: 5)()</answer>", 0),
    ],
)
def test_math(wanted: str, answer: str, points: float) -> None:
    pytest.importorskip("math_verify")
    assert score("math", answer, answer=wanted) == points


@pytest.mark.parametrize(
    ("length", "points"), [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (101, -1), (10**6, -1)]
)
def test_soft_overlong(length: int, points: float) -> None:
    """DAPO, equation 13, for 100 tokens with a buffer of 20."""
    assert soft_overlong(length, 100, 20) == pytest.approx(points)
    assert score("length", "x", completion_tokens=length, max_tokens=100, overlong_buffer=20) == pytest.approx(points)


@pytest.mark.parametrize(
    ("code", "text", "points"),
    [
        ("en", "So the sum is 12.", 1),
        ("en", "So the sum 是 twelve", 4 / 5),
        ("zh", "所以 sum 是", 3 / 4),
        ("zh", "所以答案是12", 1),
        ("ja", "これは答え", 1),
        ("ru", "Итак, x равно $x_1 + y$ двум", 3 / 4),
        ("en", r"the \(\alpha\) is $βγ$ ```ответ``` fine", 1),
        ("en", "12 + 5", 0),
        ("en", "<think>the sum</think><answer>ответ</answer>", 1),
        ("fr", "déjà vu", 1),
    ],
)
def test_language(code: str, text: str, points: float) -> None:
    assert score("language", text, language=code) == pytest.approx(points)


@pytest.mark.parametrize(
    ("check", "kept", "broken"),
    [
        ({"kind": "words", "least": 2, "most": 3}, "two words", "one"),
        ({"kind": "words", "most": 3}, "", "now four of them"),
        ({"kind": "sentences", "most": 2}, "One. Two!", "One. Two! Three"),
        ({"kind": "paragraphs", "least": 2, "most": 2}, "a\n\nb", "a\nb"),
        ({"kind": "bullets", "least": 2, "most": 2}, "- a\n* b", "- a\n-b"),
        ({"kind": "placeholders", "least": 1}, "Dear [name]", "Dear []"),
        ({"kind": "keyword", "word": "cat"}, "A Cat.", "concatenate"),
        ({"kind": "keyword", "word": "c++", "least": 2}, "c++ and C++", "c++"),
        ({"kind": "forbidden", "words": ["cat", "dog"]}, "dogma", "a dog"),
        ({"kind": "letter", "letter": "e", "most": 1}, "Eat", "sEe"),
        ({"kind": "upper_case"}, "LOUD 1!", "Loud"),
        ({"kind": "lower_case"}, "quiet 1!", "Quiet"),
        ({"kind": "no_commas"}, "a b", "a, b"),
        ({"kind": "starts_with", "beginning": "So"}, " So it is", "It is So"),
        ({"kind": "ends_with", "ending": "end."}, "the end. ", "the end. Not"),
        ({"kind": "quoted"}, '"yes"', '"yes'),
        ({"kind": "title"}, "<<A title>>\ntext", "<< >>"),
        ({"kind": "json"}, '```json\n{"a": 1}\n```', "{'a': 1}"),
    ],
)
def test_instructions(check: dict[str, object], kept: str, broken: str) -> None:
    assert score("instructions", kept, checks=[check]) == 1
    assert score("instructions", broken, checks=[check]) == 0
    assert score("instructions", SPOKEN.format(kept), checks=[check, check]) == 1
    assert score("instructions", SPOKEN.format(kept) * 2, checks=[check]) == 0


@pytest.mark.parametrize(
    ("verifier", "problem", "complaint"),
    [
        ("countdown", {"target": 5}, "'numbers' is None"),
        ("countdown", {"target": "5", "numbers": [5]}, "'target' is '5'"),
        ("integer", {"answer": True}, "'answer' is True"),
        ("math", {}, "'answer' is '': no expression"),
        ("length", {"completion_tokens": 5, "max_tokens": 9}, "'overlong_buffer' is None"),
        ("length", {"completion_tokens": 5, "max_tokens": 9, "overlong_buffer": 10}, "from 1 to max_tokens = 9"),
        ("language", {"language": "xx"}, "'language' is 'xx': one of ar,"),
        ("instructions", {}, "'checks' is None"),
        ("instructions", {"checks": [{"kind": "rhyme"}]}, "no check 'rhyme': there are words,"),
        ("instructions", {"checks": [{"kind": "words", "max": 3}]}, "check words: .*'max'"),
    ],
)
def test_a_record_that_cannot_be_used_raises(verifier: str, problem: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        score(verifier, SPOKEN.format("1"), **problem)
