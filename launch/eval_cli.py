"""`dryvine eval`: a model's results on task files of your own, and on tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn
from rich.table import Table

from dryvine.launch.data_cli import progress_bar
from dryvine.launch.open_model import Device, Dtype, ExpertMemory, HowToCompute, Model, Tokenizer, open_model
from dryvine.trainer.say import say

if TYPE_CHECKING:
    from dryvine.trainer.data.spec import OnProgress
    from dryvine.trainer.evaluation.record import TaskFile
    from dryvine.trainer.evaluation.rows import EvalRow
    from dryvine.trainer.evaluation.subject import Asking
    from dryvine.trainer.evaluation.task import Task

TASKS_HELP = "A .jsonl file, whose fields say what is measured (docs/generate.md); more may follow."
HARNESS_HELP = "Tasks of lm-evaluation-harness, by name and with commas between."


class Exam(NamedTuple):
    """All tasks of an evaluation."""

    tasks: Sequence[tuple[TaskFile, Task]]
    harness: Sequence[str]
    harness_tasks: Path | None
    limit: int | None


def evaluate(
    model: Model,
    more: Annotated[list[Path] | None, typer.Argument(hidden=True)] = None,
    tasks: Annotated[list[Path] | None, typer.Option(help=TASKS_HELP)] = None,
    harness: Annotated[str, typer.Option(help=HARNESS_HELP)] = "",
    harness_tasks: Annotated[Path | None, typer.Option(help="A folder of YAML tasks of your own for it.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint that a run has.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Lines of each file, from its first.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts that are text are a user's turn.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 256,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each problem with a verifier.")] = 16,
    temperature: Annotated[float, typer.Option(min=1e-3, help="Of those.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of those.")] = 0,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens read at once.  [default: the model's]")] = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    expert_memory: ExpertMemory = "",
    out: Annotated[Path | None, typer.Option(help="Folder for eval.jsonl and eval.png.  [default: the run's]")] = None,
    answers: Annotated[Path | None, typer.Option(help="A .jsonl file for what the model said to each line.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each task, and no table.")] = False,
) -> None:
    """Measure perplexity, multiple choice, exact match and pass@k, with 95% intervals. Rows are added to eval.jsonl of
    a run, and eval.png shows them over its steps. Exit code 1 if an answer could not be given."""
    from dryvine.trainer.evaluation.record import EvalError
    from dryvine.trainer.evaluation.subject import Asking

    asked = _asked([*(tasks or []), *(more or [])], harness, harness_tasks, limit)
    if harness and chat:
        raise EvalError("--chat is for files of your own: lm-evaluation-harness writes its own prompts")
    asking = Asking(chat, max_tokens, samples, temperature, seed, context)
    ways, code = HowToCompute(dtype, device, expert_memory), 0
    rows: list[EvalRow] = []
    _check_writable(out, answers)
    for spec in _specs(model, every):
        for row, said in _rows(spec, asked, asking, ways, tokenizer):
            code |= any(line.get("failed") for line in said)
            _keep(row, said, out or _folder_of(row), answers)
            rows.append(row)
            if as_json:
                print(row.as_json)
    if not as_json:
        Console().print(table(rows))
    if code:
        raise typer.Exit(1)


def _asked(files: Sequence[Path], harness: str, harness_tasks: Path | None, limit: int | None) -> Exam:
    """The tasks to run. Raises EvalError for one that cannot run, before any model is opened."""
    from dryvine.trainer.evaluation.harness import need_harness
    from dryvine.trainer.evaluation.kinds import task_of
    from dryvine.trainer.evaluation.record import EvalError, read_tasks

    names = [name for name in harness.split(",") if name]
    if names:
        need_harness()
    elif not files:
        raise EvalError("nothing to ask: name files with --tasks, or tasks of lm-evaluation-harness with --harness")
    read = [read_tasks(path, limit) for path in files]
    return Exam([(file, task_of(file.records)) for file in read], names, harness_tasks, limit)


def _specs(model: str, every: bool) -> list[str]:
    """The models to open: one, or one for each checkpoint of a run."""
    from dryvine.trainer.checkpoint.run_folder import complete, step_of
    from dryvine.trainer.evaluation.record import EvalError

    if not every:
        return [model]
    steps = sorted(step_of(path) for path in complete(Path(model)))
    if not steps:
        raise EvalError(f"{model}: no checkpoints here; --all is for a run folder")
    return [f"{model}@{step}" for step in steps]


Said = Sequence[Mapping[str, object]]  # what a model said to each line


def _rows(
    spec: str, asked: Exam, asking: Asking, ways: HowToCompute, tokenizer: Path | None
) -> Iterator[tuple[EvalRow, Said]]:
    from dryvine.trainer.evaluation.harness import ask
    from dryvine.trainer.evaluation.rows import EvalRow
    from dryvine.trainer.evaluation.subject import Subject

    opened = open_model(spec, ways, tokenizer)
    subject = Subject(opened.source, opened.sampler, opened.files, asking)
    step = opened.source.step
    settings = asking._asdict() | {"dtype": opened.dtype}
    with progress_bar(Console(stderr=True), MofNCompleteColumn()) as bar:
        for file, task in asked.tasks:
            findings = task(subject, partial(_of_task, bar, file.name))
            if findings.note:
                say(f"{file.name}: {findings.note}")
            lines = len(file.records)
            yield EvalRow(file.name, spec, step, lines, file.sha256, settings, findings.figures), findings.answers
        for name, lines, figures in ask(asked.harness, asked.harness_tasks, asked.limit, subject, bar):
            yield EvalRow(name, spec, step, lines, "", settings, figures), []


def _of_task(bar: OnProgress, name: str, stage: str, done: int, total: int) -> None:
    bar(f"{name}: {stage}", done, total)


def _folder_of(row: EvalRow) -> Path | None:
    """The run folder, if the row is of a run."""
    return None if row.step is None else Path(row.model.rpartition("@")[0] or row.model)


def _check_writable(out: Path | None, answers: Path | None) -> None:
    """Begin the files that the user names, so that an evaluation of hours does not end for want of them. Raises
    CannotWrite."""
    from dryvine.trainer.data.atomic import CannotWrite
    from dryvine.trainer.evaluation.rows import ROWS
    from dryvine.trainer.run_rows import append_lines

    if out is not None:
        with CannotWrite.naming(out):
            out.mkdir(parents=True, exist_ok=True)
    for path in (out and out / ROWS, answers):
        if path is not None:
            append_lines(path, ())


def _keep(row: EvalRow, said: Said, folder: Path | None, answers: Path | None) -> None:
    from dryvine.trainer.evaluation.rows import draw, keep
    from dryvine.trainer.run_rows import append_lines

    if folder is not None:
        keep(folder, row)
        draw(folder)
    if answers is not None:
        about = {"task": row.task, "model": row.model, "step": row.step}
        lines = (about | {"number": number} | dict(line) for number, line in enumerate(said))
        append_lines(answers, (json.dumps(line, ensure_ascii=False) for line in lines))


def table(rows: Sequence[EvalRow]) -> Table:
    """One line for each figure."""
    shown = Table("task", "model", "figure")
    for column in ("value", "95% interval", "lines"):
        shown.add_column(column, justify="right")
    for row in rows:
        for name, (value, low, high) in row.figures.items():
            shown.add_row(row.task, row.model, name, f"{value:.4g}", f"{low:.4g} .. {high:.4g}", f"{row.lines:,}")
    return shown
