"""The benchmarks of lm-evaluation-harness, asked of our model: an adapter, where `lm_eval` is installed.

The harness knows the prompts, few-shot examples and metrics of published benchmarks; ours has the model. Its requests
are log-likelihoods of continuations, of whole texts, and greedy answers, which are what tasks of our own files are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dryvine.trainer.data.spec import OnProgress
from dryvine.trainer.evaluation.perplexity import windows
from dryvine.trainer.evaluation.record import EvalError
from dryvine.trainer.evaluation.subject import EvalQuestion, Subject
from dryvine.trainer.intervals import Figure, Z

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

BOOTSTRAP = 100  # of metrics that are no means, for their errors
ERROR = "_stderr"  # behind the name of a metric: its standard error


def need_harness() -> str:
    """Its version. Raises EvalError without it."""
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        raise EvalError('--harness needs lm-evaluation-harness: pip install "dryvine[harness]"') from None


class HarnessResult(NamedTuple):
    """Of one of its tasks; `lines` that were asked."""

    task: str
    lines: int
    figures: dict[str, Figure]


def ask(
    tasks: Sequence[str], folder: Path | None, limit: int | None, subject: Subject, on_progress: OnProgress
) -> list[HarnessResult]:
    """`folder` holds YAML files of tasks of your own. Raises EvalError."""
    if not tasks:
        return []
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder) if folder else None)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise EvalError(f"--harness: lm-evaluation-harness has no task {unknown[0]!r}; `lm_eval ls tasks` lists them")
    found = simple_evaluate(
        adapted(subject, on_progress), tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=BOOTSTRAP
    )
    lines = {name: count["effective"] for name, count in found["n-samples"].items()}
    return [HarnessResult(name, lines.get(name, 0), _figures(result)) for name, result in found["results"].items()]


def adapted(subject: Subject, on_progress: OnProgress) -> LM:
    """What the harness calls a model."""
    from lm_eval.api.model import LM

    class Adapter(LM):
        def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
            passages = [subject.choice(*request.args) for request in requests]
            scores = subject.score(passages, on_progress)
            return [(float(score.logprobs.sum()), bool(score.best.all())) for score in scores]

        def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
            texts = [list(windows(subject.document(request.args[0]), subject.context)) for request in requests]
            scores = subject.score([one for some in texts for one in some], on_progress)
            return [sum(float(next(scores).logprobs.sum()) for _ in some) for some in texts]

        def generate_until(self, requests: list[Instance]) -> list[str]:
            questions = [_question(*request.args) for request in requests]
            answers = subject.answers(questions, 1, 0.0, on_progress)
            return [subject.answer_text(asked, one) for asked, (one,) in zip(questions, answers, strict=True)]

    return Adapter()


def _question(context: str, ways: Mapping[str, object]) -> EvalQuestion:
    """Of the harness's arguments of a generation. Raises EvalError for sampling, which its tasks that need it do with a
    seed that the harness does not name."""
    if ways.get("do_sample") or ways.get("temperature"):
        raise EvalError("--harness: a task that samples its answers: ask it as a file of your own with a verifier")
    until, most = ways.get("until", ()), ways.get("max_gen_toks")
    ends = (until,) if isinstance(until, str) else tuple(str(end) for end in until)  # type: ignore[attr-defined]
    return EvalQuestion(context, tuple(end for end in ends if end), most if isinstance(most, int) else None)


def _figures(result: Mapping[str, object]) -> dict[str, Figure]:
    """The metrics of a task, with the normal interval of the standard error that the harness gives."""
    found = {}
    for key, value in result.items():
        name, _, kind = key.partition(",")
        if isinstance(value, float) and not name.endswith(ERROR):
            error = result.get(f"{name}{ERROR},{kind}")
            half = Z * error if isinstance(error, float) else float("nan")
            found[name] = Figure(value, value - half, value + half)
    return found
