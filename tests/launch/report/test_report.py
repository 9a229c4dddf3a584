"""Reports of run folders: every curve and event in the page; what a watch shows; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dryvine.launch.report.curves import curves
from dryvine.launch.report.page import report_page
from dryvine.launch.report.runs import Event, RunFolder
from dryvine.launch.report.watch import sparks, view, watch
from dryvine.trainer.config import Config, ConfigError, dump
from dryvine.trainer.run_rows import Figures, append, read
from dryvine.trainer.spikes import Rollback, write_down


def row(step: int, **figures: float | None) -> Figures:
    found: Figures = {
        "step": step, "tokens": step * 512, "loss": 5.0 - step / 10, "val_loss": None, "lr": 1e-3, "grad_norm": 1.0,
        "skipped": 0, "tokens_per_second": 1000.0, "bubble": 0.25, "exposed_comm_share": 0.125, "load_imbalance": 1.5,
        "rank_imbalance": 1.2, "seconds": 0.5, "checkpoint_stall_ms": None,
    }  # fmt: skip
    return found | figures


def folder(path: Path, config: Config, rows: list[Figures]) -> Path:
    path.mkdir()
    (path / "config.toml").write_text(dump(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (path / "starts.jsonl").write_text('{"after_step": 0, "at": "2026-11-26T01:00:00+00:00"}\n')
    with (path / "starts.jsonl").open("a") as file:
        file.write('{"after_step": 2, "at": "2026-11-26T02:00:00+00:00"}\n')
    (path / "expert_load.jsonl").write_text('{"step": 3, "loads": [[1, 3, 0, 0], [2, 2, 2, 2]]}\n')
    return path


@pytest.fixture
def run(tiny: Callable[..., Config], tmp_path: Path) -> Path:
    rows = [row(1, val_loss=5.0), row(2, skipped=1), row(3, val_loss=4.6, checkpoint_stall_ms=12.4)]
    rows[2] |= {"val_loss.code": 4.4, "watts": 650.0, "celsius": 61.0, "peak_mbytes": 70_000.0}
    return folder(tmp_path / "first", tiny("run.hardware=h100", "run.name=first"), rows)


def test_a_report_has_a_picture_of_everything_that_was_measured(run: Path) -> None:
    text = report_page([RunFolder.open(run)])
    headings = ("Loss", "Learning rate", "Speed", "Shares of a step", "Load of the experts", "Power", "Temperature",
                "Memory", "Planned and measured", "Events")  # fmt: skip
    assert all(f"<h2>{name}" in text for name in headings)
    assert "validation, code" in text, "by source, where there is one"
    assert "bubble, planned" in text
    assert text.count("<svg") == 10
    assert "http" not in text.replace("http://www.w3.org", ""), "nothing is fetched"


def test_events_are_in_order_and_say_what_happened(run: Path) -> None:
    assert list(RunFolder.open(run).events()) == [
        Event(0, "start", "started at 2026-11-26T01:00:00+00:00"),
        Event(2, "skip", "updated nothing (1 in a row): skipped.jsonl"),
        Event(2, "start", "started at 2026-11-26T02:00:00+00:00"),
        Event(3, "checkpoint", "checkpoint, training stood still for 12 ms"),
    ]


def test_planned_and_measured_stand_side_by_side(run: Path) -> None:
    opened = RunFolder.open(run)
    assert opened.plan is not None
    text = report_page([opened])
    assert f"<td>{opened.plan.step_seconds:.4g}</td><td>0.5</td>" in text
    assert "<td>70</td>" in text, "GB of the fullest GPU"
    flop = opened.plan.flop_per_token[0]
    assert opened.mfu()[0] == pytest.approx(1000 * flop / 989.4e12)


def test_runs_are_compared_by_name(run: Path, tiny: Callable[..., Config], tmp_path: Path) -> None:
    other = folder(tmp_path / "second", tiny("run.name=second"), [row(1), row(2)])
    text = report_page([RunFolder.open(run), RunFolder.open(other)])
    assert "first: training" in text
    assert "second: training" in text
    assert "<title>Report of first and second</title>" in text


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path, tiny: Callable[..., Config]) -> None:
    paths = [tmp_path / where / "tiny" for where in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        folder(path, tiny(), [row(1)])
    runs = RunFolder.open_all([*paths, paths[0]])
    assert [run.name for run in runs] == ["a/tiny", "b/tiny"]
    text = report_page(runs)
    assert "a/tiny: training" in text
    assert "b/tiny: training" in text


def test_the_folder_that_a_user_is_in_has_a_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert RunFolder.open_all([Path()])[0].name == "first"


def test_a_loss_that_is_no_longer_finite_is_said(tmp_path: Path, tiny: Callable[..., Config]) -> None:
    rows = [row(1), row(2), row(3, loss=float("nan"), grad_norm=float("inf"), tokens_per_second=float("inf"))]
    opened = RunFolder.open(folder(tmp_path / "nan", tiny(), rows))
    assert opened.column("loss")[-1] is None
    assert "4.900 to not finite" in report_page([opened])
    out = StringIO()
    watch(opened.path, Console(file=out, width=100), 1.0, once=True)
    said = {line.split()[1]: line for line in out.getvalue().splitlines() if line.startswith("│")}
    assert all("not finite" in said[name] for name in ("loss", "grad_norm"))
    assert "4.8000" not in said["loss"], "the last finite one is not what it is now"
    assert curves([opened], "grad_norm")["grad_norm"].gaps


def test_a_row_of_which_nothing_is_known_is_shown(tmp_path: Path, tiny: Callable[..., Config]) -> None:
    unknown = dict.fromkeys(row(1), None) | {"step": 1, "tokens": 512}
    path = folder(tmp_path / "unknown", tiny(), [unknown])
    assert "1 of 6" in report_page([RunFolder.open(path)])
    out = StringIO()
    watch(path, Console(file=out), 1.0, once=True)
    assert out.getvalue().count("not finite") == 2, "loss and the norm of the gradient"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ((), "its config names no hardware (run.hardware)"),
        (("run.hardware=/cluster/ours.toml",), "hardware &#x27;/cluster/ours.toml&#x27;: no such kind; there are"),
        (("run.hardware=made.toml",), "made.toml: gpu_count: unknown key"),
        (("run.hardware=text.toml",), "text.toml: cannot be read as TOML"),
    ],
)
def test_hardware_that_cannot_be_read_keeps_nobody_from_a_report_that_says_why(
    changes: tuple[str, ...], why: str, tmp_path: Path, tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("made.toml").write_text("gpu_count = 8\n")
    Path("text.toml").write_text("eight GPUs\n")
    path = folder(tmp_path / "far", tiny(*changes), [row(1)])
    assert f"nothing was planned: {why}" in report_page([RunFolder.open(path)])


def test_a_rollback_is_an_event(run: Path) -> None:
    write_down(run, Rollback(step=2, loss=50.0, usual=5.0, to_step=1, first=8, sequences=16))
    (spike,) = (event for event in RunFolder.open(run).events() if event.kind == "spike")
    back = "back to step 1; sequences 8 to 23 are passed over (rollbacks.jsonl)"
    assert spike == Event(2, "spike", f"loss 50, usual 5: {back}")


def test_a_row_after_one_that_was_cut_off_replaces_it(run: Path) -> None:
    for name in ("expert_load.jsonl", "new.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 4, "loads": [[1,')
        append(run, name, {"step": 4, "loads": [[4, 4, 4, 4]]})
        append(run, name, {"step": 5, "loads": [[5, 4, 4, 4]]})
    assert [row["step"] for row in read(run, "expert_load.jsonl")] == [3, 4, 5]
    assert [row["step"] for row in read(run, "new.jsonl")] == [4, 5]


def test_a_line_that_is_no_row_is_refused_and_the_last_may_be_cut(run: Path) -> None:
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"step": 4, "lo')
    assert len(RunFolder.open(run).rows) == 3
    (run / "metrics.jsonl").write_text("[1]\n" + whole)
    with pytest.raises(ConfigError, match="line 1: not a row of figures"):
        RunFolder.open(run)


def test_what_is_no_run_is_refused(tmp_path: Path, tiny: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"no run folder: it has no config\.toml"):
        RunFolder.open(tmp_path)
    empty = folder(tmp_path / "empty", tiny(), [])
    with pytest.raises(ConfigError, match="no step has been recorded yet"):
        RunFolder.open(empty)
    with pytest.raises(ConfigError, match="no run folder"):
        watch(tmp_path, Console(), 1.0, once=True)


def test_a_watch_shows_the_newest_figures_and_that_a_run_is_late(run: Path) -> None:
    opened, out = RunFolder.open(run), StringIO()
    console = Console(file=out, width=100)
    watch(run, console, 1.0, once=True)
    said = out.getvalue()
    assert "step 3 of 6, 0:00:02 to go" in said
    assert "4.7000" in said
    assert "650" in said
    console.print(view(opened.config, opened.rows, 60.0, 100))
    assert "nothing for 60 s" in out.getvalue()
    console.print(view(opened.config, [], 0.0, 100))
    assert "no step yet" in out.getvalue()


def test_a_watch_ends_with_the_run(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(6)) + "\n")
    watch(run, Console(file=StringIO(), force_terminal=True), 0.1, once=False)


def test_what_is_no_terminal_is_shown_once(run: Path) -> None:
    out = StringIO()
    watch(run, Console(file=out, width=100), 60.0, once=False)
    assert "step 3 of 6" in out.getvalue()


@pytest.mark.parametrize("width", [30, 40, 50, 60, 100])
def test_a_watch_in_a_narrow_terminal_shows_the_newest_figures_whole(run: Path, width: int) -> None:
    opened, out = RunFolder.open(run), StringIO()
    rows = [row(step, loss=float(step)) for step in range(1, 101)]
    Console(file=out, width=width).print(view(opened.config, rows, 0.0, width))
    lines = out.getvalue().splitlines()
    assert "…" not in out.getvalue()
    assert all(len(line) <= width for line in lines)
    (line,) = (line for line in lines if line.startswith("│ loss"))
    assert "100.0000" in line
    assert ("█ │" in line) == (width >= 50), "the course up to now, or none"


def test_sparks_go_from_the_least_to_the_largest() -> None:
    assert sparks([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparks([1.0] * 100) == "▁" * 40
    assert len(sparks(list(range(1000)))) == 40
