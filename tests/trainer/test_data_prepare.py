"""The embedded corpus: ranks that start at once share one build; what does not fit the config is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from pydantic import ValidationError
from tokenizers import Tokenizer

from dryvine.trainer.data import prepare as prepare_module
from dryvine.trainer.data.build import build
from dryvine.trainer.data.config import DataConfig, DataError
from dryvine.trainer.data.dataset import Dataset
from dryvine.trainer.data.inputs import Input
from dryvine.trainer.data.packed_tokens import PackedTokens
from dryvine.trainer.data.prepare import prepare
from dryvine.trainer.data.source import TokenSource
from dryvine.trainer.data.spec import BuildSpec, fingerprint
from dryvine.trainer.data.stdlib import stdlib_files

RANK = """
import sys
from pathlib import Path
from dryvine.trainer.data import build, prepare
from dryvine.trainer.data.config import DataConfig
files, run = prepare.stdlib_files(), build._build
prepare.stdlib_files = lambda: files[:60]
build._build = lambda *arguments: print("builds") or run(*arguments)
print(prepare.prepare(DataConfig(seq_len=8, vocab_size=500, dir=Path(sys.argv[1])), deadline=50))
"""


def test_ranks_that_start_at_once_build_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [rank.communicate(timeout=60)[0].split() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert sorted(len(lines) for lines in printed) == [1, 1, 2]
    folders = {lines[-1] for lines in printed}
    assert len(folders) == 1
    assert Dataset.load(Path(folders.pop())).train.documents > 40


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Input]:
    """The embedded corpus cut to its first files."""
    files = stdlib_files()[:80]
    monkeypatch.setattr(prepare_module, "stdlib_files", lambda: files)
    return files


def test_real_text_to_real_sequences(tmp_path: Path, small: list[Input]) -> None:
    config = DataConfig(seq_len=64, vocab_size=1000, dir=tmp_path, validation_fraction=0.2)
    folder = prepare(config)
    packed = {split: PackedTokens(folder, split) for split in ("train", "val")}
    text = Tokenizer.from_file(str(folder / "tokenizer.json"))
    files = []
    for tokens in packed.values():
        ends = tokens.document_ends().astype(int)
        files += [
            text.decode(tokens.tokens(a, b - a - 1).tolist(), skip_special_tokens=False)
            for a, b in zip([0, *ends[:-1]], ends, strict=True)
        ]
    assert sorted(files) == sorted(filter(None, (file.path.read_bytes().decode() for file in small)))
    dataset = Dataset.load(folder)
    assert dataset.vocab_size == 1000
    assert dataset.val.documents > 5
    assert 2.5 < dataset.train.bytes / dataset.train.tokens < 4
    assert TokenSource(folder, "val", 64, 2, 0).sequences(0, 3).max() < 1000


def test_each_config_has_its_folder_and_the_same_one_twice(tmp_path: Path, small: list[Input]) -> None:
    del small[5:]
    configs = [DataConfig(seq_len=8, vocab_size=size, dir=tmp_path) for size in (300, 310, 300)]
    folders = [prepare(config) for config in configs]
    assert folders[0] == folders[2] != folders[1]
    assert [Dataset.load(folder).vocab_size for folder in folders] == [300, 310, 300]


def test_fingerprints_know_names_sizes_and_settings_but_not_places(small: list[Input]) -> None:
    spec = BuildSpec(vocab_size=300)
    mark = fingerprint(small, spec)
    assert fingerprint([file._replace(path=Path("/elsewhere")) for file in small], spec) == mark
    assert fingerprint([small[0]._replace(size=1), *small[1:]], spec) != mark
    assert fingerprint(small[1:], spec) != mark
    assert fingerprint(small, BuildSpec(vocab_size=301)) != mark


def test_a_given_tokenizer_counts_by_its_content(tmp_path: Path, small: list[Input]) -> None:
    marks = []
    for name, content in (("a", "one"), ("b", "one"), ("b", "two")):
        (tmp_path / f"{name}.json").write_text(content)
        marks.append(fingerprint(small, BuildSpec(tokenizer=tmp_path / f"{name}.json")))
    assert marks[0] == marks[1] != marks[2]
    assert fingerprint(small, BuildSpec(vocab_size=300)) not in marks


def test_the_config_of_a_run_reaches_the_build(tmp_path: Path, small: list[Input]) -> None:
    del small[30:]
    reports: list[str] = []
    config = DataConfig(seq_len=8, vocab_size=300, dir=tmp_path, validation_fraction=0.3, fim_rate=0.25)
    recipe = Dataset.load(prepare(config, on_progress=lambda stage, *_: reports.append(stage))).recipe
    assert (recipe["vocab_size"], recipe["validation_fraction"], recipe["fim_rate"]) == (300, 0.3, 0.25)
    assert set(reports) == {"learning the vocabulary", "tokenizing"}


def test_waiting_has_an_end(tmp_path: Path, small: list[Input]) -> None:
    config = DataConfig(seq_len=8, vocab_size=300, dir=tmp_path)
    folder = tmp_path / fingerprint(small, BuildSpec(vocab_size=300))
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(DataError, match="another process is building here"):
        prepare(config, deadline=0.1)


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path, small: list[Input]) -> None:
    build(small[:5], BuildSpec(vocab_size=300), tmp_path / "own")
    config = DataConfig(seq_len=8, source=str(tmp_path / "own"), vocab_size=300)
    assert prepare(config) == tmp_path / "own"
    assert prepare(config.model_copy(update={"vocab_size": 512})) == tmp_path / "own"
    with pytest.raises(DataError, match=r"data\.vocab_size = 299: .* has 300 token ids; set data\.vocab_size = 300"):
        prepare(config.model_copy(update={"vocab_size": 299}))
    with pytest.raises(DataError, match="no finished dataset here; make one with `dryvine data build`"):
        prepare(config.model_copy(update={"source": str(tmp_path / "none")}))


def test_config_refuses_what_it_does_not_know() -> None:
    for wrong in ({"seq_len": 0}, {"seq_len": 8, "vocab_size": 100}, {"seq_len": 8, "sorce": "x"}, {}):
        with pytest.raises(ValidationError):
            DataConfig.model_validate(wrong)


def test_data_needs_no_torch() -> None:
    """So that data is built on a login node."""
    code = "import sys, dryvine.trainer.data.prepare, dryvine.trainer.data.source; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
