"""The commands as a user runs them: exit codes, and what is printed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dryvine.trainer.checkpoint import run_folder

TINY = str(Path(__file__).parents[1] / "tiny.toml")
CONFIGS = Path(__file__).parents[2] / "configs"
DUALPIPE = ("parallel.pp=2", "parallel.schedule=dualpipe")


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from dryvine.launch.cli import main; main()", *words]


def given(corpus: Path, out: Path) -> tuple[str, ...]:
    return f'data.source="{corpus}"', f'run.out="{out}"', "model.layers=3", "batch.sequences=8"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=200, check=False)


def test_train_launches_ranks_and_ends_with_the_table(corpus: Path, tmp_path: Path) -> None:
    done = run("train", TINY, *DUALPIPE, *given(corpus, tmp_path), "run.steps=2")
    assert done.returncode == 0, done.stderr
    for line in ("dualpipe", "validation loss", "tokens/s", "overlapped forwards", "run folder"):
        assert line in done.stdout
    assert (tmp_path / "tiny" / "checkpoints" / "step-00000002").is_dir()


@pytest.mark.long
def test_a_signal_to_the_launcher_saves_and_says_so(corpus: Path, tmp_path: Path) -> None:
    never = ("run.steps=100000", "run.eval_every=100000", "run.checkpoint_every=100000")
    words = command("train", TINY, *DUALPIPE, *given(corpus, tmp_path), *never)
    rows = tmp_path / "tiny" / "metrics.jsonl"
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 100
        while time.monotonic() < until and not (rows.exists() and rows.read_text().count("\n") >= 2):
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=100)
    assert process.returncode == 75, errors
    assert "the same command goes on from there" in out
    assert "Traceback" not in errors
    assert len(run_folder.complete(tmp_path / "tiny")) == 1


def test_ctrl_c_while_ranks_start_ends_at_once_and_not_with_0(corpus: Path, tmp_path: Path) -> None:
    words = command("train", TINY, *DUALPIPE, *given(corpus, tmp_path))
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while process.poll() is None and len(children.read_text().split()) < 2:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=25)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "Traceback" not in errors


@pytest.mark.long
def test_verify_says_what_deviates_and_by_how_much(corpus: Path, tmp_path: Path) -> None:
    done = run("verify", TINY, "parallel.ep=2", *given(corpus, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "gradient norm" in done.stdout
    assert "layers.N.experts" in done.stdout


def test_what_cannot_be_is_one_line_and_exit_code_2(corpus: Path, tmp_path: Path) -> None:
    for words in (("train", TINY, "parallel.pp=3", "parallel.schedule=dualpipe"), ("verify", TINY, "optim.lrr=1")):
        done = run(*words, *given(corpus, tmp_path))
        assert done.returncode == 2
        assert done.stderr.startswith("dryvine: ")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("plan", TINY, "--html"),
        ("plan", TINY, "--sweep", "--gpus", "2", "--html"),
        ("demos", "--count", "10", "--out"),
        ("schedule", "1f1b", "--pp", "2", "--microbatches", "4", "--format", "svg", "--out"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("")
    done = run(*words, str(tmp_path / "file" / "page"))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"dryvine: {tmp_path}/file/page: ")
    assert "Traceback" not in done.stderr


def test_a_run_whose_folder_cannot_be_made_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("train", TINY, *given(corpus, tmp_path / "file"), "run.steps=1")
    assert done.returncode == 2, done.stderr
    assert f"{tmp_path}/file/tiny: cannot be made: Not a directory; set run.out" in done.stderr
    assert done.stderr.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("plan", TINY, "--gpus", "8"), "--gpus is for --sweep"),
        (("plan", TINY, "--sweep", "--profile", "x.json"), "leave one out"),
        (("plan", TINY, "--price", "inf"), "--price"),
        (("train", TINY, "--rank", "1"), "--rank and --hardware are for --dry-run"),
        (("train", TINY, "--rank", "0"), "--rank and --hardware are for --dry-run"),
        (("train", TINY, "--dry-run", "--max-restarts", "2"), "--max-restarts is for a run"),
        (("train", TINY, "--hardware", "h100"), "--rank and --hardware are for --dry-run"),
        (("train", str(CONFIGS / "deepseek_v3_671b.toml")), "2,048 ranks (parallel.pp x dp x ep) "),
        (("rl", str(CONFIGS / "countdown_sft.toml")), "has no table [rl]; `dryvine sft` runs it"),
        (("sft", TINY), "has no table [sft]; `dryvine train` runs it"),
        (("doctor", "run.steps=1"), "overrides are of --before-run"),
        (("doctor", "--before-run", TINY, "--nodes", "8,8"), "--nodes: with --before-run CONFIG says it"),
        (
            ("doctor", "--before-run", TINY, "--experts", "8", "--hidden", "64"),
            "--experts, --hidden: with --before-run",
        ),
        (("doctor", "--before-run", TINY, "--world", "0", "--top-k", "2"), "--world, --top-k: with --before-run"),
        (("doctor", "--world", "-3"), "--world"),
        (("doctor", "--nodes", "8,a"), "--nodes 8,a: write the ranks on each node"),
        (("doctor", "--nodes", "8,0"), "--nodes 8,0: write the ranks on each node"),
        (("doctor", "--groups", "8"), "--groups 8: write groups:limit"),
        (("doctor", "--groups", "8:9"), "--groups 8:9: write groups:limit"),
        (("doctor", "--nodes", "8,8", "--top-k", "300"), "--top-k 300: a token has 256 experts"),
        (("bench", "comm", "--backends", "flatt"), "--backends flatt: no 'flatt'; there are flat, "),
        (("bench", "comm", "--dtypes", "fp4"), "--dtypes fp4: no 'fp4'; there are bf16, fp8"),
        (("bench", "comm", "--top-k", "65"), "--top-k 65: a token has 64 experts"),
        (("bench", "comm", "--experts", "7"), "--experts 7: they do not divide over 4 ranks"),
        (("bench", "comm", "--hidden", "100"), "--hidden 100: FP8 has a scale for each 128 values"),
        (("bench", "comm", "--out", "picture.foo"), "--out picture.foo: give a file that ends with .png or .svg"),
        (("bench", "comm", "--out", "no/such/folder/a.png"), "in a folder that exists"),
        (("bench", "comm", "--tokens", "many"), "--tokens many: write tokens a rank"),
        (("bench", "comm", "--nodes", "8,0"), "--nodes 8,0: write the ranks on each node"),
    ],
)
def test_an_option_that_would_be_ignored_or_makes_no_sense_is_refused(words: tuple[str, ...], says: str) -> None:
    done = run(*words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("dryvine: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
