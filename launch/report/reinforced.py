"""The report of RL runs: is the reward real, does the policy still explore, do sampler and trainer agree, and what do
the answers look like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from statistics import median

from dryvine.launch.pages import plots
from dryvine.launch.pages.page import cards, heading, paragraph, picture, quote, table
from dryvine.launch.pages.plots import Curve, Mark
from dryvine.launch.report.curves import curves
from dryvine.launch.report.runs import Event, RunFolder
from dryvine.trainer.run_rows import Figures, not_finite

SHOWN = 1500  # characters of an answer
ROLLOUTS = (1, 5)  # whose samples are shown: so many of the first, and of the newest

# Each plot: what it says, the unit of its axis, its columns by name, and whether the axis is logarithmic.
PLOTS: dict[str, tuple[str, str, dict[str, str], bool]] = {
    "Reward": (
        "Rewards of sampled answers; correct: the share that the deciding verifier holds for right.",
        "mean of a rollout",
        {"reward": "reward", "correct": "correct"},
        False,
    ),
    "Held-out questions": (
        "With 95% intervals over questions. pass@k above pass@1 is what is left to gain; both down: the policy breaks.",
        "share",
        {"eval_pass_1": "pass@1", "eval_greedy": "greedy", "eval_pass_k": "pass@k"},
        False,
    ),
    "Length of answers": (
        "Near the longest allowed, answers are cut and lose their reward.",
        "tokens",
        {"length": "mean", "longest": "longest"},
        False,
    ),
    "Entropy": ("Toward 0 the policy stops exploring.", "nats per token", {"entropy": "entropy"}, False),
    "Sampler and trainer": (
        "How far the sampler's probabilities are from the trainer's for the same weights, and the policy from its "
        "reference.",
        "log-probability",
        {"mismatch_k3": "k3", "mismatch_logprob": "largest difference", "reference_k3": "k3 from the reference"},
        True,
    ),
    "Shares": (
        "zero variance: groups whose answers all earn the same and teach nothing; unscored: no verdict.",
        "share",
        {
            "zero_variance": "zero variance",
            "clip_fraction": "clipped tokens",
            "route_mismatch": "other experts",
            "overlong": "out of tokens",
            "unscored": "unscored",
        },
        False,
    ),
    "Norm of the gradient": ("", "L2", {"grad_norm": "grad_norm"}, False),
    "Time of a rollout": (
        "",
        "seconds",
        {"seconds_sample": "sampling", "seconds_score": "scoring", "seconds_learn": "learning"},
        False,
    ),
}


def reinforced_parts(runs: Sequence[RunFolder]) -> Iterator[str]:
    for run in runs:
        p, rl = run.config.parallel, run.config.rl
        assert rl is not None
        yield paragraph(
            f"{run.name}: {rl.task.get('name')}, preset {rl.preset}, {rl.questions} questions x {rl.samples} answers; "
            f"pp {p.pp} x dp {p.dp} x ep {p.ep}, {run.config.run.dtype}; {run.path}"
        )
        yield cards(_figures(run))
    marks = _marks(runs[0]) if len(runs) == 1 else ()
    for title, (says, unit, columns, logarithmic) in PLOTS.items():
        drawn = _columns(runs, columns if title != "Reward" else columns | _scores(runs))
        if drawn:
            yield heading(title)
            yield paragraph(says)
            yield picture(plots.lines(drawn, "update", unit, marks, logarithmic), f"{title} by update")
    yield from _alarms(runs)
    for run in runs:
        yield from _samples(run, len(runs) > 1)


def _figures(run: RunFolder) -> dict[str, str]:
    """The most important figures: first value to newest."""
    found = {"updates": f"{run.rows[-1]['step']:,} of {run.config.run.steps:,}"}
    for column, title in {"reward": "reward", "length": "tokens of an answer", "entropy": "entropy, nats"}.items():
        if known := run.known(column):
            now = "not finite" if not_finite(run.rows[-1], column) else f"{known[-1]:.3g}"
            found[title] = f"{known[0]:.3g} to {now}"
    for column, title in {"eval_pass_1": "held-out pass@1", "eval_pass_k": "held-out pass@k"}.items():
        if known := run.known(column):
            low, high = run.known(f"{column}_low")[-1], run.known(f"{column}_high")[-1]
            found[f"{title}, now {low:.0%} to {high:.0%}"] = f"{known[0]:.1%} to {known[-1]:.1%}"
    if rates := run.known("tokens_per_second"):
        found["tokens/s of the whole loop"] = f"{median(rates):,.0f}"
    return found


def _columns(runs: Sequence[RunFolder], columns: Mapping[str, str]) -> dict[str, Curve]:
    """The columns that are not 0 throughout."""
    return {
        name: curve
        for column, title in columns.items()
        for name, curve in curves(runs, column, title).items()
        if any(curve.y)
    }


def _scores(runs: Sequence[RunFolder]) -> dict[str, str]:
    """The verifiers' columns, if there are several."""
    names = dict.fromkeys(name for run in runs for row in run.rows for name in row if name.startswith("score."))
    return {name: name.removeprefix("score.") for name in names} if len(names) > 1 else {}


def _marks(run: RunFolder) -> list[Mark]:
    """Marks of restarts, and of the first alarm of each figure."""
    marks: dict[str, Mark] = {}
    for event in run.events():
        if event.kind == "alarm":
            marks.setdefault(_crossed(event), Mark(event.step, _crossed(event)))
        elif event.kind == "start" and event.step > 0:
            marks[event.what] = Mark(event.step, event.kind)
    return list(marks.values())[-20:]


def _alarms(runs: Sequence[RunFolder]) -> Iterator[str]:
    """One line for each figure that crossed a bound, with how often it did."""
    found: dict[tuple[str, str], list[Event]] = {}
    for run in runs:
        for event in run.events():
            if event.kind == "alarm":
                found.setdefault((run.name, _crossed(event)), []).append(event)
    yield heading("Alarms")
    if not found:
        yield paragraph("None.", "good")
        return
    rows = [
        (name, str(events[0].step), str(events[-1].step), str(len(events)), events[-1].what)
        for (name, _), events in found.items()
    ]
    yield table(["run", "first update", "last", "times", "the last"], rows, text_last=True)


def _crossed(alarm: Event) -> str:
    """The figure that an alarm is about: its first word."""
    return alarm.what.partition(":")[0]


def _samples(run: RunFolder, named: bool) -> Iterator[str]:
    """Answers of the first rollouts and of the newest, for comparison."""
    rollouts = [list(rows) for _, rows in groupby(run.samples, key=lambda row: row["step"])]
    first, newest = ROLLOUTS
    chosen = rollouts if len(rollouts) <= first + newest else rollouts[:first] + rollouts[-newest:]
    if chosen:
        yield heading(f"Answers to read: {run.name}" if named else "Answers to read")
    for row in (row for rows in chosen for row in rows):
        yield paragraph(_said(row))
        text = row["answer"]
        cut = f"\n... {len(text) - SHOWN} more characters" if len(text) > SHOWN else ""
        yield quote(f"{row['question']}\n\n{text[:SHOWN]}{cut}")


def _said(row: Figures) -> str:
    verdicts = (
        f"{name} {'unscored' if score is None else f'{score:g}'}{f' ({why})' if why else ''}"
        for name, (score, why) in row["verdicts"].items()
    )
    reward = "none" if row["reward"] is None else f"{row['reward']:g}"
    return f"update {row['step']}: reward {reward}, advantage {row['advantage']:.2f}; {', '.join(verdicts)}"
