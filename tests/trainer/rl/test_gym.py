"""reasoning-gym: questions from seeds, answers scored in a sandbox, and what evaluates nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dryvine.trainer.rl.tasks.names import questions
from dryvine.trainer.rl.tasks.question import TaskError
from dryvine.trainer.rl.verifiers.gym import harmless
from dryvine.trainer.rl.verifiers.pool import Pool
from dryvine.trainer.rl.verifiers.verdict import Job, Verdict
from tests.support.sandbox import needs_sandbox

SUMS = {"name": "reasoning_gym", "dataset": "chain_sum", "options": {"max_terms": 3}, "train_size": 30}


@pytest.mark.parametrize(
    "text",
    [
        "3", "-94*4 - 61", "5!", "x**2 + 3*x*y", "sin(x) + exp(2*x)/2 + C", "[1, 2.5]", "[['_', 'Q'], ['Q', '_']]",
        "(1, 2)", "1 2 3\n4 5 6", "North", "two words", "", "5 +", "9**9**9**9", "exec", "(" * 5000,
    ],
)  # fmt: skip
def test_what_evaluates_nothing_may_be_scored(text: str) -> None:
    assert harmless(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('id')", "__import__('os').system('id')!", "(lambda: 1)()", "lambda: 1", "lambda x",
        "f(1)", "x.y", "x[0]", "f'{1}'", "[i for i in x]", "{1: 2}", "{1}", "(y := 1)", "1 if x else 2", "a < b",
        "x and y", "sin(x=1)", "sqrt(\"__import__('os').system('id')\")", "b'x'", "_", " exec('x')", "eval('x')",
        "sin(*x)", "(1)(2)", "\uff45xec('x')",
    ],
)  # fmt: skip
def test_what_might_run_something_is_not_evaluated(text: str) -> None:
    assert not harmless(text)


def test_questions_are_of_the_dataset_and_none_is_held_out() -> None:
    pytest.importorskip("reasoning_gym")
    train, held = questions(SUMS, "train"), questions(SUMS, "validation")
    assert len(held) == 200
    assert not {q.messages[-1]["content"] for q in train} & {q.messages[-1]["content"] for q in held}
    assert train[0].deciding == "reasoning_gym"
    assert questions(SUMS | {"system": "Think."}, "train")[0].messages[0] == {"role": "system", "content": "Think."}


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"dataset": "chain"}, "rl.task: chain: "),
        ({"options": {"terms": 3}}, "rl.task: chain_sum: .*terms"),
        ({"options": {"max_terms": 1}}, "rl.task: chain_sum: "),
        ({"dataset": "coin_flip", "options": {}, "train_size": 0}, "rl.task.train_size: "),
    ],
)
def test_what_is_no_dataset_is_refused(keys: dict[str, object], complaint: str) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(TaskError, match=complaint):
        questions(SUMS | keys, "train")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pytest.importorskip("reasoning_gym")
    with Pool(["reasoning_gym"], 1) as made:
        yield made


def score(pool: Pool, answer: str, **record: object) -> Verdict:
    source = {"dataset": "countdown", "options": {}, "seed": 1, "size": 5, "index": 0}
    (verdict,) = pool.score([Job("reasoning_gym", f"<answer>{answer}</answer>", source | record)])
    return verdict


@needs_sandbox
def test_answers_are_scored_and_tricks_are_not(pool: Pool) -> None:
    import reasoning_gym

    entry = reasoning_gym.create_dataset("countdown", seed=1, size=5)[0]
    assert score(pool, entry["metadata"]["expression"]).score == 1.0
    assert score(pool, "1 + 1").score == 0.0, "0.05 by the package"
    assert 0 < (score(pool, "1 + 1", partial=True).score or 0) < 1
    assert score(pool, "__import__('os')._exit(0)") == Verdict(0.0, "countdown would evaluate it")
    assert score(pool, "9**9**9**9") == Verdict(0.0, "its scoring took too long, or ended")
    assert score(pool, entry["metadata"]["expression"]).score == 1.0, "the next is scored as before"


@needs_sandbox
def test_what_the_package_cannot_read_is_wrong_and_what_it_has_not_is_not_scored(pool: Pool) -> None:
    assert score(pool, "many", dataset="prime_factorization").score == 0.0
    missing = score(pool, "1", dataset="chess")
    assert missing.score is None
    assert "chess" in missing.why
    assert score(pool, "1", index=None).score is None
