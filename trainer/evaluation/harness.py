"""An adapter for lm-evaluation-harness, if `lm_eval` is installed: its benchmarks on our model.

The harness has the prompts, few-shot examples and metrics of published benchmarks. It requests log-likelihoods of
continuations and of whole texts, and greedy answers, which are what the tasks of our own files need too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dryvine.comm.extras import install
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
    """The installed version. Raises EvalError if there is none."""
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        raise EvalError(f"--harness needs lm-evaluation-harness: {install('lm_eval')}") from None


class HarnessResult(NamedTuple):
    """The result of one of its tasks; `lines`: how many were asked."""

    task: str
    lines: int
    figures: dict[str, Figure]


def ask(
    tasks: Sequence[str], folder: Path | None, limit: int | None, subject: Subject, on_progress: OnProgress
) -> list[HarnessResult]:
    """Run tasks of the harness. `folder` holds YAML files of tasks of your own. Raises EvalError."""
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
    """Our model as the harness's `LM`."""
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
    """The harness's arguments of a generation. Raises EvalError for sampling, since the harness's tasks give no
    seed."""
    if ways.get("do_sample") or ways.get("temperature"):
        raise EvalError("--harness: a task that samples its answers: ask it as a file of your own with a verifier")
    until, most = ways.get("until", ()), ways.get("max_gen_toks")
    ends = (until,) if isinstance(until, str) else tuple(str(end) for end in until)  # type: ignore[attr-defined]
    return EvalQuestion(context, tuple(end for end in ends if end), most if isinstance(most, int) else None)


def _figures(result: Mapping[str, object]) -> dict[str, Figure]:
    """The metrics of a task, with the normal interval of the harness's standard error."""
    found = {}
    for key, value in result.items():
        name, _, kind = key.partition(",")
        if isinstance(value, float) and not name.endswith(ERROR):
            error = result.get(f"{name}{ERROR},{kind}")
            half = Z * error if isinstance(error, float) else float("nan")
            found[name] = Figure(value, value - half, value + half)
    return found
