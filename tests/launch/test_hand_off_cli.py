"""`dryvine export` and `dryvine import` as typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dryvine.launch.cli import app, main
from dryvine.trainer.data.atomic import CannotWrite
from tests.support.hand_off import run_of, small


def invoke(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_there_and_back_with_a_check(tmp_path: Path) -> None:
    run_of(small(), tmp_path / "run")
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    code, said = invoke("export", str(tmp_path / "run"), "--out", out, "--check")
    assert (code, "transformers" in said, "fine" in said) == (0, True, True), said
    code, said = invoke("import", out, "--out", back)
    assert code == 0, said
    assert f'run.init_from = "{back}"' in said
    code, _ = invoke("export", f"{back}@0", "--format", "gguf", "--quant", "q8_0", "--out", str(tmp_path / "gguf"))
    assert code == 0
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {"model.gguf", "Modelfile"}
    # Another model's export is not what is checked.
    run_of(small(route_scale=1.0), tmp_path / "other")
    with pytest.raises(ValueError, match=r"routed_scaling_factor: is 2\.5"):
        CliRunner().invoke(app, ["export", str(tmp_path / "other"), "--out", out, "--check"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("export", "{run}@7", "--out", "{out}"), "no checkpoint of step 7; it has 0"),
        (("export", "{out}", "--out", "{out}"), "no checkpoint here"),
        (("import", "{run}", "--out", "{out}"), "config.json: No such file"),
        (("import", "{run}", "--out", "{run}"), "has checkpoints already"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    words: tuple[str, ...],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_of(small(), tmp_path / "run")
    places = {"run": str(tmp_path / "run"), "out": str(tmp_path / "out")}
    monkeypatch.setattr("sys.argv", ["dryvine", *(word.format(**places) for word in words)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dryvine: ")
    assert line in last


@pytest.mark.parametrize("out", ["file/in", "closed/in"])
@pytest.mark.parametrize(
    "words",
    [
        ("export", "{run}"),
        ("export", "{run}", "--format", "gguf", "--quant", "q8_0"),
        ("import", "{hf}"),
        ("prune", "{run}", "--text", "{text}", "--keep", "4"),
    ],
    ids=lambda words: " ".join(words[::2]),
)
def test_what_cannot_be_written_is_one_line_with_its_name(words: tuple[str, ...], out: str, tmp_path: Path) -> None:
    run_of(small(), tmp_path / "run")
    assert invoke("export", str(tmp_path / "run"), "--out", str(tmp_path / "hf"))[0] == 0
    (tmp_path / "text.jsonl").write_text('{"text": "def f(x):\\n    return x\\n"}\n')
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").symlink_to("/proc/self")  # where root cannot make files either
    given = [word.format(run=tmp_path / "run", hf=tmp_path / "hf", text=tmp_path / "text.jsonl") for word in words]
    with pytest.raises(CannotWrite, match=f"{out}.*: .*; fix that, and run the same command again"):
        CliRunner().invoke(app, [*given, "--out", str(tmp_path / out)], catch_exceptions=False)
