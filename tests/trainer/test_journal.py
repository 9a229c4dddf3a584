"""The run folder by itself: rows that a resumed run makes again, TensorBoard, the commit, the table at the end."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib import pyplot
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from dryvine.trainer import journal
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.data.atomic import CannotWrite
from dryvine.trainer.data.identity import UNKNOWN
from dryvine.trainer.journal import Journal, MetricsRow
from dryvine.trainer.report import final_table
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.run_rows import append, read

Tiny = Callable[..., Config]


def row(step: int, **changes: float | None) -> MetricsRow:
    base = MetricsRow(
        step=step, tokens=step * 512, loss=6.0 - step, lr=1e-3, grad_norm=1.0, tokens_per_second=100.0 * step**2,
        bubble=0.25, overlapped_share=0.5, exposed_comm_ms=10.0, exposed_comm_share=0.125, slowest_rank_ms=3.0,
        mtp_loss=None, balance_loss=None, load_imbalance=1.0, rank_imbalance=1.0, mbytes_inside_nodes=0.0,
        mbytes_between_nodes=0.0, fp8_bad_tiles=None, fp8_floored_share=None, seconds=1.0,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _first_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of events are read in the order of their names, which end with a count of this process: 10 before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def written(config: Config, *rows: MetricsRow, resume_step: int = 0) -> None:
    open_folder = Journal(config, make_plan(config).schedule, resume_step)
    for one in rows:
        open_folder.write(one)
    open_folder.close()


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def table(config: Config, rows: list[journal.Figures]) -> list[tuple[str, str]]:
    names, values = (list(column.cells) for column in final_table(config, rows).columns)
    return list(zip(map(str, names), map(str, values), strict=True))


def test_a_run_killed_before_its_first_checkpoint_begins_with_no_rows(tiny: Tiny) -> None:
    """Reinforcement learning has a row of step 0, of what it begins with."""
    config = tiny()
    written(config, row(0), row(1))
    written(config, row(0), row(1), row(2))
    assert [r["step"] for r in journal.read(config.run.folder)] == [0, 1, 2]


def test_a_resumed_run_replaces_the_rows_after_its_checkpoint(tiny: Tiny) -> None:
    config = tiny()
    written(config, row(1), row(2), row(3))
    written(config, row(3, loss=9.0), row(4), resume_step=2)
    assert [(r["step"], r["loss"]) for r in journal.read(config.run.folder)] == [(1, 5.0), (2, 4.0), (3, 9.0), (4, 2.0)]
    assert scalars(config.run.folder, "loss") == [(1, 5.0), (2, 4.0), (3, 9.0), (4, 2.0)]


def test_what_is_not_finite_or_not_known_is_null(tiny: Tiny) -> None:
    config = tiny()
    written(config, row(1), row(2, loss=math.nan, grad_norm=math.inf))
    text = (config.run.folder / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    last = journal.read(config.run.folder)[-1]
    assert (last["loss"], last["grad_norm"], last["mtp_loss"], last["lr"]) == (None, None, None, 1e-3)
    assert scalars(config.run.folder, "loss") == [(1, 5.0)]


def test_the_keys_of_a_row_are_those_that_others_read(tiny: Tiny) -> None:
    """And their order. What reads metrics.jsonl outside this repository knows these names."""
    config = tiny()
    written(config, row(1))
    assert " ".join(json.loads((config.run.folder / "metrics.jsonl").read_text())) == (
        "step tokens loss val_loss val_loss_ema lr grad_norm skipped tokens_per_second bubble overlapped_share "
        "exposed_comm_ms exposed_comm_share slowest_rank_ms mtp_loss balance_loss load_imbalance rank_imbalance "
        "mbytes_inside_nodes mbytes_between_nodes fp8_bad_tiles fp8_floored_share seconds checkpoint_stall_ms "
        "peak_mbytes watts celsius exposed_zero_ms graph_overflows"
    )


def test_a_row_can_be_read_as_soon_as_it_is_written(tiny: Tiny) -> None:
    """By whoever watches the run, and after it was killed."""
    config = tiny()
    open_folder = Journal(config, make_plan(config).schedule, 0)
    open_folder.write(row(1))
    assert [r["step"] for r in journal.read(config.run.folder)] == [1]
    open_folder.close()


def test_the_picture_has_both_losses_and_what_a_guess_would_lose(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as still_open:
        still_open.setattr(pyplot, "close", lambda figure: None)
        written(tiny(), row(1, val_loss=6.5, val_loss_ema=7.0), row(2), row(3, val_loss=3.5, val_loss_ema=4.0))
    (axes,) = pyplot.gcf().axes
    drawn = {str(line.get_label()): [float(y) for y in line.get_ydata()] for line in axes.lines}
    pyplot.close("all")
    assert drawn == {
        "training": [5.0, 4.0, 3.0],
        "validation": [6.5, 3.5],
        "validation, averaged weights": [7.0, 4.0],
        "uniform guess, ln(vocab) = 5.77": [math.log(320)] * 2,
    }


@pytest.mark.parametrize(
    ("table", "change"),
    [("model", "model.layers=7"), ("data", "data.seq_len=16"), ("batch", "batch.sequences=8")],
)
def test_a_folder_of_another_run_is_refused(tiny: Tiny, table: str, change: str) -> None:
    written(tiny())
    with pytest.raises(ConfigError, match=rf"another \[{table}\] table"):
        journal.same_run(tiny(change), UNKNOWN)
    journal.same_run(tiny("parallel.ep=2", "optim.lr=1", "run.steps=9"), UNKNOWN)


def test_the_commit_has_a_plus_if_files_were_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(("git", *identity, *words), cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    monkeypatch.setattr(journal, "__file__", str(tmp_path / "journal.py"))
    assert journal.commit() == "unknown"
    git("init", "-q")
    (tmp_path / "a").write_text("one")
    git("add", "a")
    git("commit", "-qm", "a")
    (tmp_path / "untracked").write_text("")
    assert journal.commit() == git("rev-parse", "HEAD")
    (tmp_path / "a").write_text("two")
    assert journal.commit() == git("rev-parse", "HEAD") + "+"


def test_the_table_has_first_and_last_losses_and_median_rates(tiny: Tiny) -> None:
    rows = [vars(row(step, val_loss=None if step == 3 else 7.0 - step)) for step in (1, 2, 3)]
    rows[1]["exposed_comm_ms"] = None
    text = table(tiny(), rows)
    for line in (
        ("steps", "3"),
        ("tokens", "1,536"),
        ("loss", "5.000 -> 3.000"),
        ("validation loss", "6.000 -> 5.000"),
        ("tokens/s", "400"),
        ("bubble, worst rank", "25.0%"),
        ("overlapped forwards", "50.0%"),
        ("exposed all-to-all", "10 ms (12.5%)"),
        ("wait for the slowest rank", "3 ms"),
    ):
        assert line in text
    assert "averaged" not in str(text)
    assert ("the same of averaged weights", "5.500 -> 5.500") in table(
        tiny("optim.ema=0.5"), [r | {"val_loss_ema": 5.5} for r in rows]
    )


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', "\0\0\0\0", "\xff"])
def test_a_torn_last_row_is_dropped_and_the_run_goes_on(tiny: Tiny, tail: str) -> None:
    """As a full disk or a lost host leaves it."""
    config = tiny()
    written(config, row(1), row(2))
    path = config.run.folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + tail.encode("latin-1"))
    assert [r["step"] for r in journal.read(config.run.folder)] == [1, 2]
    written(config, row(3), resume_step=2)
    assert [r["step"] for r in journal.read(config.run.folder)] == [1, 2, 3]


def test_a_damaged_row_in_the_middle_is_named_before_a_run_begins(tiny: Tiny) -> None:
    config = tiny()
    written(config, row(1), row(2), row(3))
    path = config.run.folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], lines[2]]))
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 2: not a row of figures; restore"):
        journal.same_run(config, UNKNOWN)


def test_a_damaged_row_at_the_end_is_named_too(tiny: Tiny) -> None:
    """No kill leaves a newline behind a part of a row."""
    config = tiny()
    written(config, row(1))
    path = config.run.folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo\n')
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 2: not a row of figures"):
        read(config.run.folder)


def test_a_row_that_only_lacks_its_newline_is_kept(tmp_path: Path) -> None:
    (tmp_path / "starts.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert [r["step"] for r in read(tmp_path, "starts.jsonl")] == [1, 2]
    append(tmp_path, "starts.jsonl", {"step": 3})
    assert [r["step"] for r in read(tmp_path, "starts.jsonl")] == [1, 2, 3]


def test_a_row_that_cannot_be_written_names_its_file(tiny: Tiny) -> None:
    config = tiny()
    open_folder = Journal(config, make_plan(config).schedule, 0)
    open_folder._lines.close()
    open_folder._lines = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(CannotWrite, match=r"metrics.jsonl: No space left on device; fix that"):
        open_folder.write(row(1))
    with pytest.raises(CannotWrite):
        open_folder.close()


def test_a_run_without_a_finite_loss_ends_with_a_table_that_says_so(tiny: Tiny) -> None:
    rows = [vars(row(step)) | {"loss": None, "val_loss": None} for step in (1, 2)]
    text = table(tiny(), rows)
    assert ("loss", "at no step finite") in text
    assert ("validation loss", "at no step finite") in text
