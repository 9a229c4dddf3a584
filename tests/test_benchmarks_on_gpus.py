"""`benchmarks.on_gpus` without a GPU: jobs of its own kind are played, and the command line of every job is right."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.distributed import run as torchrun

from benchmarks import on_gpus
from benchmarks.support import gpu_jobs
from benchmarks.support.corpus import corpus_folder
from benchmarks.support.jobs import ROOT, SLOTS, TOO_LATE, Job, Lanes, Session, forecast
from dryvine.trainer.config import load
from dryvine.trainer.run_plan import make_plan
from tests.support.processes import wait_until_ended

OUT = Path("/out")
EVERY = [job for part in gpu_jobs.PARTS.values() for job in part(OUT)]


def played(jobs: list[Job], out: Path, gpus: list[str], seconds: float = 60) -> Session:
    session = Session(gpus, time.monotonic() + seconds, out, out / "all.zip", Console(quiet=True))
    session.play(jobs)
    return session


class Impatient(Job):
    limit = 3.0  # type: ignore[assignment]


# ---- playing


def test_what_was_right_wrong_and_late_is_told_and_nothing_outlives_its_job(tmp_path: Path) -> None:
    """The hanging one has started a process in a session of its own, as torchrun starts its ranks, and another whose
    parent is gone."""
    start = """
import subprocess, sys, time
print("child", subprocess.Popen(["sleep", "60"], start_new_session=True).pid, flush=True)
"""
    hangs = f"""{start}
subprocess.run([sys.executable, "-c", {start!r}])
time.sleep(60)
"""
    jobs = [
        Job("good", ("-c", "print('noise'); print('speed 5'); print('speed 7')"), 9, "speed"),
        Job("bad", ("-c", "print('about to'); 1 / 0"), 9, "speed"),
        Job("bad by itself", ("-c", "print('speed 5'); print('row 3 DIFFERS')"), 9, "speed", wrong="DIFFERS"),
        Impatient("hangs", ("-c", hangs), 1, "child"),
        Job("killed", ("-c", "import os; print('last words', flush=True); os.kill(os.getpid(), 9)"), 9, "words"),
        Job("absent", ("-c", ""), 9, "", under=("no-such-tool",)),
        Job("too late", ("-c", ""), 900, ""),
    ]
    session = played(jobs, tmp_path, ["0", "1"])
    found = {done.job.name: done for done in session.results}
    assert {name: done.outcome for name, done in found.items()} == {
        "good": "right", "bad": "exit 1", "bad by itself": "WRONG", "hangs": "out of time",
        "killed": "killed by signal 9", "absent": "not run", "too late": TOO_LATE,
    }  # fmt: skip
    assert found["good"].lines == ["speed 5", "speed 7"]
    assert found["bad"].lines == ["ZeroDivisionError: division by zero"]
    assert found["bad by itself"].lines[-1] == "row 3 DIFFERS"
    children = [line.split()[1] for line in found["hangs"].lines]
    assert len(children) == 2
    wait_until_ended(children)
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == ["bad.txt", "bad_by_itself.txt", "good.txt", "hangs.txt", "killed.txt"]
        assert archive.read("good.txt").startswith(b"noise")


def test_no_signal_goes_to_the_number_of_a_job_that_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is reaped, its number may be another's."""
    signalled: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: signalled.append(group))
    (done,) = played([Job("good", ("-c", "print('speed 5')"), 9, "speed")], tmp_path, ["0"]).results
    assert (done.outcome, signalled) == ("right", [])


def test_the_archive_can_be_read_while_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kills the session then leaves the files of all jobs before."""
    write, seen = zipfile.ZipFile.write, []

    def noting(self: zipfile.ZipFile, *given: Any) -> None:
        write(self, *given)
        if (tmp_path / "all.zip").exists():
            with zipfile.ZipFile(tmp_path / "all.zip") as archive:
                seen.append(archive.namelist())

    monkeypatch.setattr(zipfile.ZipFile, "write", noting)
    with zipfile.ZipFile(tmp_path / "all.zip.part", "w") as left:
        left.writestr("by one that was killed", "")
    played([Job(name, ("-c", ""), 9, "") for name in ("one", "two", "three")], tmp_path, ["0"])
    assert seen == [["one.txt"], ["one.txt", "two.txt"]]


def test_at_the_end_of_all_time_what_runs_is_ended_and_kept(tmp_path: Path) -> None:
    words = "import time; print('half', flush=True); time.sleep(60)"
    (done,) = played([Job("long", ("-c", words), 1, "half")], tmp_path, ["0"], seconds=3).results
    assert (done.outcome, done.lines) == ("out of time", ["half"])
    assert done.seconds < 20


def test_jobs_see_their_own_gpus_and_what_is_timed_has_them_alone(tmp_path: Path) -> None:
    """By what each says of its GPUs and its time: one of two GPUs, two that are timed, four that share one."""
    say = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], time.time()); time.sleep(0.5); print(time.time())"
    asked = [(2, SLOTS)] + [(1, SLOTS)] * 2 + [(1, 2)] * 4
    jobs = [Job(f"j{n}", ("-c", say), 5, "", gpus, slots) for n, (gpus, slots) in enumerate(asked)]
    played(jobs, tmp_path, ["2", "5"])
    said = [(tmp_path / f"j{n}.txt").read_text().split() for n in range(len(asked))]
    spans = [(set(gpus.split(",")), float(begin), float(end)) for gpus, begin, end in said]
    assert [len(gpus) for gpus, *_ in spans] == [gpus for gpus, _ in asked]
    assert set.union(*(gpus for gpus, *_ in spans)) == {"2", "5"}
    for n, (gpus, begin, end) in enumerate(spans[:3]):
        others = [span for m, span in enumerate(spans) if m != n and span[0] & gpus]
        assert all(e <= begin or b >= end for _, b, e in others)
    shared = spans[3:]
    assert any(a[0] & b[0] and a[1] < b[2] and b[1] < a[2] for a in shared for b in shared if a is not b)


def test_a_job_of_several_gpus_is_not_overtaken_forever() -> None:
    """Lanes are neighbours, and a job that finds no room holds back those behind it."""
    one, two = Job("one", (), 10, ""), Job("two", (), 10, "", gpus=2)
    lanes = Lanes("0123")
    assert lanes.take(one) == ("0",)
    assert lanes.take(two) == ("2", "3")
    assert lanes.take(two) is None
    lanes.give(one, ("0",))
    assert lanes.take(two) == ("0", "1")
    assert forecast([two, one, one, one], "01") == 30
    assert forecast([one, two, one, one], "01") == 30
    assert forecast([Job("check", (), 10, "", slots=2)] * 9, "01") == 20


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU, and four jobs, of which one needs two."""

    def jobs(out: Path) -> list[Job]:
        write = f"open({str(out / 'good.json')!r}, 'w').write('1'); print('fine')"
        reads = f"print(open({str(corpus_folder(out, 5) / 'text')!r}).read())"
        return [
            Job("good", ("-c", write), 1, "fine"), Job("late", ("-c", ""), 99, ""), Job("wide", (), 1, "", gpus=2),
            Job("reads", ("-c", reads), 1, "", vocab=5),
        ]  # fmt: skip

    def build(out: Path, vocab: int) -> None:
        corpus_folder(out, vocab).mkdir()
        (corpus_folder(out, vocab) / "text").write_text(f"{vocab} tokens")

    monkeypatch.setitem(gpu_jobs.PARTS, "checks", jobs)
    monkeypatch.setattr(on_gpus, "corpus", build)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")


@pytest.mark.usefixtures("few")
def test_the_whole_command_with_a_table_and_what_was_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--part", "checks", "--deadline", "30", "--out", str(tmp_path / "found.2")]
    monkeypatch.setattr(sys, "argv", ["on_gpus", *words])
    assert on_gpus.main() == 1
    said = capsys.readouterr().out
    assert "for more GPUs: wide" in said
    assert "for another time: --only 'late'" in said
    with zipfile.ZipFile(tmp_path / "found.2.zip") as archive:
        assert sorted(archive.namelist()) == ["good.json", "good.txt", "reads.txt", "table.txt"]
        assert "fine" in archive.read("table.txt").decode()
        assert archive.read("reads.txt") == b"5 tokens\n"


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "good", "godo", "wi*"], "on_gpus.py: --only 'godo': no such job in --part checks; --list tells"),
        (["--only", "wide"], "on_gpus.py: on 1 GPUs there is nothing to run: all 1 jobs need more"),
        (["--gpus", "0"], "argument --gpus: 0: give 1 or more"),
        (["--gpus", "-1", "--list"], "argument --gpus: -1: give 1 or more"),
    ],
)
def test_nothing_to_run_is_an_error_before_anything_is_emptied(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "before.txt").touch()
    (tmp_path / "found.zip").touch()
    monkeypatch.setattr(sys, "argv", ["on_gpus", "--part", "checks", "--out", str(tmp_path / "found"), *words])
    with pytest.raises(SystemExit) as refused:
        on_gpus.main()
    assert refused.value.code
    assert told in f"{refused.value.code}{capsys.readouterr().err}"
    assert (tmp_path / "found" / "before.txt").exists()
    assert (tmp_path / "found.zip").exists()


# ---- loss curves


def test_a_curve_that_is_not_whole_is_wrong_and_the_others_are_compared(tmp_path: Path) -> None:
    def write(name: str, losses: list[float], rest: str = "") -> None:
        (tmp_path / f"curve_{name}").mkdir()
        rows = "".join(json.dumps({"step": n, "loss": loss}) + "\n" for n, loss in enumerate(losses, 1))
        (tmp_path / f"curve_{name}" / "metrics.jsonl").write_text(rows + rest)

    curve = [5.0 - n / 100 for n in range(gpu_jobs.STEPS)]
    write("one", curve)
    write("same", [loss + 0.019 for loss in curve])
    write("far", [*curve[:-1], curve[-1] + 0.021])
    write("torn", curve[:-1], '{"step": 50, "lo')
    write("short", curve[:7])
    write("empty", [])
    write("nan", [*curve[:9], float("nan"), *curve[10:]])
    (tmp_path / "curve_none").mkdir()
    (tmp_path / "curve_same.txt").write_text("what the job said")
    found = {done.job.name: done for done in gpu_jobs.compare_curves(tmp_path)}
    assert {name.removesuffix(", compared"): done.outcome for name, done in found.items()} == {
        "curve_same": "right", "curve_far": "WRONG", "curve_torn": "WRONG", "curve_short": "WRONG",
        "curve_empty": "WRONG", "curve_nan": "WRONG", "curve_none": "WRONG",
    }  # fmt: skip
    assert found["curve_nan, compared"].lines == ["finite losses of 9 steps, of 50 on one GPU; 50 are needed"]
    (tmp_path / "curve_one" / "metrics.jsonl").write_text("")
    assert {done.outcome for done in gpu_jobs.compare_curves(tmp_path)} == {"WRONG"}


# ---- command lines


class Parsed(Exception):
    """The module has taken its command line."""


@pytest.fixture
def only_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_known_args

    def parsed(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        _, rest = parse(self, args, namespace)
        raise Parsed if not rest else AssertionError(f"unknown: {rest}")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parsed)


BENCHMARKS = {
    job.name: (word, job.words[at + 1 :])
    for job in EVERY
    for at, word in enumerate(job.words)
    if word.startswith("benchmarks.")
}


@pytest.mark.usefixtures("only_parsed")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_takes_its_words(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, words = BENCHMARKS[name]
    monkeypatch.setattr(sys, "argv", [module, *words])
    main = importlib.import_module(module).main
    if name == "dispatch alone":  # it reads no words
        assert not words
        return
    with pytest.raises(Parsed):
        main()


def test_every_benchmark_for_gpus_has_a_job_or_is_said_to_have_none() -> None:
    files = [path for path in (ROOT / "benchmarks").glob("**/*.py") if path.parent.name != "support"]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in files}
    run = {word for job in EVERY for word in job.words} | {"benchmarks.on_gpus"}
    without = {name for name, text in modules.items() if "cuda" in text and name not in run}
    (sentence,) = re.findall(r"(`[^.]*(?:\.\w[^.]*)*) have no job\.", (ROOT / "docs/benchmarks.md").read_text())
    said = re.findall(r"`([\w.]+)`", sentence)
    assert without == {f"benchmarks.{name}" for name in said}


def test_torchrun_takes_its_words() -> None:
    found = [torchrun.parse_args(job.words[2:]) for job in EVERY if "torch.distributed.run" in job.words]
    assert [args.nproc_per_node for args in found] == ["2", "2", "4", "4"]
    assert all(args.standalone and args.module for args in found)


def test_every_layout_is_a_config(corpus: Path) -> None:
    count = 0
    for job in EVERY:
        if "tests/tiny.toml" in job.words:
            words = [re.sub("^data.source=.*", f"data.source={corpus}", word) for word in job.words if "=" in word]
            config = make_plan(load(ROOT / "tests/tiny.toml", words)).config
            assert config.parallel.world in (job.gpus, 1)
            assert job.vocab == config.model.vocab
            assert f"data.source={corpus_folder(OUT, job.vocab)}" in job.words
            count += 1
        else:
            assert not any(word.startswith("data.source") for word in job.words)
    assert count > 30


def test_every_file_is_there_and_every_name_its_own() -> None:
    for job in EVERY:
        assert all((ROOT / word).exists() for word in job.words if re.search(r"^\w.*\.(py|toml)$", word)), job.name
    assert len({job.slug for job in EVERY}) == len(EVERY)


@pytest.mark.parametrize(
    ("pattern", "line", "wrong"),
    [
        (gpu_jobs.SKIPPED, "2 skipped, 17 deselected in 3.94s", True),
        (gpu_jobs.SKIPPED, "4 passed, 2 skipped in 3.94s", False),
        (gpu_jobs.FAILED, "planner: rank 1 of 2 failed:", True),
        (gpu_jobs.FAILED, "BF16 on: 351 ms, busy 97.4%", False),
        (gpu_jobs.FAILED_PEER, "transformers eager: OutOfMemoryError: CUDA out of memory", True),
        (gpu_jobs.FAILED_PEER, "dryvine fp8: not done in 80 s; last: step 2", True),
        (gpu_jobs.FAILED_PEER, "dryvine fp8: fp8.gemm: triton 1 ms; left out: deep_gemm (ImportError: none)", False),
    ],
)
def test_lines_that_say_that_a_job_went_wrong(pattern: str, line: str, wrong: bool) -> None:
    assert bool(re.search(pattern, line)) == wrong


def test_races_of_warps_that_start_are_not_races() -> None:
    (job,) = (job for job in EVERY if job.name == "racecheck")
    told = "========= Error: Race reported between Write access at {}+0x430 in sums.py:80"
    for name, wrong in (("wgrad_kernel", False), ("product_kernel", False), ("rows_kernel", True)):
        assert bool(re.search(job.wrong, told.format(name))) == wrong


def test_races_that_were_not_printed_may_be_any() -> None:
    (job,) = (job for job in EVERY if job.name == "racecheck")
    told = "========= RACECHECK SUMMARY: {} hazards displayed (2000000 errors, 0 warnings)"
    limit = job.under[job.under.index("--print-limit") + 1]
    assert re.search(job.wrong, told.format(limit))
    assert not re.search(job.wrong, told.format(200))


@pytest.mark.long
def test_every_job_of_pytest_selects_tests() -> None:
    for job in EVERY:
        if "pytest" in job.words:
            words = [sys.executable, *job.words, "--collect-only"]
            done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=100, check=False)
            assert done.returncode == 0, f"{job.name}: {done.stdout}"
