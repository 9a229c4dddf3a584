"""Copies and quotes that were put into a dataset are found, and nothing else; without them it is a dataset again."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dryvine.launch.cli import app
from dryvine.trainer.data import stream
from dryvine.trainer.data.build import build
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import Dataset
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.quality.clean import CleanSpec, find_repeats, write_clean
from dryvine.trainer.data.quality.documents import DocumentPlace, Repeat, SplitDocuments, ngrams, splits_of
from dryvine.trainer.data.quality.figures import by_length, quarantined_by_reason, split_figures
from dryvine.trainer.data.spec import BuildSpec
from tests.support.built import texts_of

WORDS = [f"{a}{b}" for a in "bcdfghjklmnp" for b in "aeiou"]


def text_of(seed: int, words: int = 120) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def changed(text: str, words: int) -> str:
    """With so many words in a row taken out of its middle."""
    parts = text.split()
    return " ".join([*parts[:40], *parts[40 + words :]])


def dataset_of(folder: Path, texts: list[str], val: float = 0.3, shard_tokens: int = 2**26) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    spec = BuildSpec(vocab_size=400, validation_fraction=val, shard_tokens=shard_tokens)
    build(match_files([f"{folder}/a.jsonl"]), spec, folder / "data")
    return folder / "data"


def texts_by_place(folder: Path) -> dict[DocumentPlace, str]:
    return {
        DocumentPlace(split, i): text for split in ("train", "val") for i, text in enumerate(texts_of(folder, split))
    }


def test_ngrams_are_equal_where_the_tokens_are() -> None:
    tokens = np.array([5, 6, 7, 8, 5, 6, 7, 9], np.uint16)
    found = ngrams(tokens, 3)
    assert found.shape == (6,)
    assert found[0] == found[4]
    assert len(set(found.tolist())) == 5
    assert (found == ngrams(tokens.astype(np.uint32), 3)).all()
    assert ngrams(tokens, 9).size == 0
    assert ngrams(np.array([0, 0, 0]), 2)[0] != ngrams(np.array([0, 0, 0]), 3)[0]
    many = np.unique(ngrams(np.random.default_rng(0).integers(0, 300, 200_000), 5))
    assert many.size > 199_990
    assert np.unique(many & np.uint64(0xFFFFFFFF)).size > 199_990 - 20  # about 5 pairs of 200,000 collide in 32 bits


def test_copies_are_found_and_nothing_else(tmp_path: Path) -> None:
    """Records 0..39 differ; of 0..9 there is an exact copy, of 10..19 one with 4 words less, of 20..29 half of it."""
    pytest.importorskip("datasketch")
    originals = [text_of(seed) for seed in range(40)]
    copies = [*originals[:10], *(changed(text, 4) for text in originals[10:20])]
    halves = [changed(text, 60) for text in originals[20:30]]
    folder = dataset_of(tmp_path, [*originals, *copies, *halves, "short", "short", "", "brief"])
    found = [repeat for repeat in find_repeats(folder, CleanSpec()) if repeat.what != "quoted"]
    texts = texts_by_place(folder)
    pairs = {frozenset((texts[f.place], texts[f.of])): f for f in found if f.of}
    expected = {frozenset((text,)) for text in (*originals[:10], "short")}
    expected |= {frozenset((text, changed(text, 4))) for text in originals[10:20]}
    assert set(pairs) == expected
    assert len(found) == len(expected)
    for pair, repeat in pairs.items():
        assert repeat.what == ("exact copy" if len(pair) == 1 else "near copy")
        assert repeat.share == 1.0 if len(pair) == 1 else 0.8 <= repeat.share < 1
        assert repeat.of
        assert repeat.of < repeat.place if repeat.of.split == repeat.place.split else repeat.of.split == "val"
    across = [f for f in found if f.of and f.of.split != f.place.split]
    assert across, "some near copies are on the other side"
    assert sum(repeat.tokens for repeat in found) == sum(
        int(SplitDocuments(folder, f.place.split).sizes[f.place.number]) for f in found
    )


def test_the_similarity_is_that_of_sets_of_5_grams(tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    text = text_of(1)
    folder = dataset_of(tmp_path, [text, changed(text, 12), *(text_of(seed) for seed in range(5, 9))], val=0.0)
    (found,) = find_repeats(folder, CleanSpec(similarity=0.5))
    documents = splits_of(folder)["train"]
    first, second = (
        {tuple(ids[i : i + 5]) for i in range(len(ids) - 4)}
        for ids in (documents.tokens(0).tolist(), documents.tokens(1).tolist())
    )
    assert found.place == ("train", 1)
    assert found.of == ("train", 0)
    assert found.share == pytest.approx(len(first & second) / len(first | second))
    assert not find_repeats(folder, CleanSpec(similarity=0.95))


def test_candidates_that_are_less_similar_are_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever hashing proposes: here, every earlier document."""
    datasketch = pytest.importorskip("datasketch")
    earlier: list[DocumentPlace] = []
    monkeypatch.setattr(datasketch.MinHashLSH, "insert", lambda _, key, *__, **___: earlier.append(key))
    monkeypatch.setattr(datasketch.MinHashLSH, "query", lambda *_: earlier)
    texts = [text_of(seed) for seed in range(12)]
    folder = dataset_of(tmp_path, [*texts, *(changed(text, 60) for text in texts), changed(texts[4], 4)], val=0.0)
    (found,) = find_repeats(folder, CleanSpec())
    assert (found.place, found.of) == (("train", 24), ("train", 4))


def test_what_training_text_quotes_of_validation_is_found(tmp_path: Path) -> None:
    """Each of a few validation texts inside a long training text, whole or by a third, amid other words."""
    pytest.importorskip("datasketch")
    texts = [text_of(seed) for seed in range(60)]
    plain = dataset_of(tmp_path, texts)
    held_out = texts_of(plain, "val")[:6]
    assert not find_repeats(plain, CleanSpec())
    whole = [f"{text_of(1000 + i, 400)} {text} {text_of(2000 + i, 400)}" for i, text in enumerate(held_out[:3])]
    thirds = [f"{text_of(3000 + i, 400)} {' '.join(text.split()[:40])}" for i, text in enumerate(held_out[3:])]
    (tmp_path / "more").mkdir()
    folder = dataset_of(tmp_path / "more", [*texts, *whole, *thirds])
    held, by_place = set(texts_of(folder, "val")), texts_by_place(folder)
    quoting = [i for i, text in enumerate([*whole, *thirds]) if text not in held]
    found = find_repeats(folder, CleanSpec())
    assert {by_place[f.place] for f in found} == {held_out[i] for i in quoting if i < 3}
    assert all((f.what, f.of, f.place.split) == ("quoted", None, "val") and f.share > 0.85 for f in found)
    assert {by_place[f.place] for f in find_repeats(folder, CleanSpec(quoted=0.2))} == {held_out[i] for i in quoting}
    assert not find_repeats(folder, CleanSpec(ngram=2000))


def test_a_copy_that_is_quoted_too_is_reported_once(tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    texts = [text_of(seed) for seed in range(60)]
    held_out = texts_of(dataset_of(tmp_path, texts), "val")[0]
    (tmp_path / "more").mkdir()
    quoting = [f"{text_of(seed, 400)} {held_out}" for seed in (901, 902, 903)]
    folder = dataset_of(tmp_path / "more", [*texts, held_out, *quoting])
    found = find_repeats(folder, CleanSpec())
    by_place = texts_by_place(folder)
    assert sorted((f.what, by_place[f.place]) for f in found) == [("exact copy", held_out), ("quoted", held_out)]
    assert len({f.place for f in found}) == 2


def test_a_copy_in_training_is_no_quote(tmp_path: Path) -> None:
    """The training copy goes, and the validation document stays."""
    pytest.importorskip("datasketch")
    texts = [text_of(seed) for seed in range(40)]
    folder = dataset_of(tmp_path, [*texts, *(changed(text, 3) for text in texts)])
    found = find_repeats(folder, CleanSpec())
    assert {f.what for f in found} == {"near copy"}
    assert {(f.place.split, f.of.split) for f in found if f.of} >= {("train", "val"), ("train", "train")}


@pytest.mark.parametrize("shard_tokens", [2**26, 3000])
def test_a_clean_dataset_is_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_tokens: int) -> None:
    """Bytes, documents, shards and splits; and in it nothing more is found."""
    pytest.importorskip("datasketch")
    monkeypatch.setattr(stream, "BATCH_BYTES", 1000)
    texts = [text_of(seed) for seed in range(30)]
    more = [texts[3], changed(texts[5], 4), f"{text_of(99, 500)} {texts[7]}"]
    folder = dataset_of(tmp_path, [*texts, *more], shard_tokens=shard_tokens)
    spec = CleanSpec()
    found = find_repeats(folder, spec)
    before, gone = texts_by_place(folder), {f.place for f in found}
    after = write_clean(folder, tmp_path / "clean", spec, found)
    for split in ("train", "val"):
        left = [text for place, text in before.items() if place.split == split and place not in gone]
        assert texts_of(tmp_path / "clean", split) == left
        assert after.split(split).bytes == sum(len(text.encode()) for text in left)
        assert after.split(split).documents == len(left)
    assert Dataset.load(tmp_path / "clean") == after
    assert after.fingerprint != Dataset.load(folder).fingerprint
    assert after.recipe["dedup_similarity"] == 0.8
    other = write_clean(tmp_path / "clean", tmp_path / "again", spec, [])
    assert other.fingerprint not in (after.fingerprint, Dataset.load(folder).fingerprint)
    rows = [json.loads(line) for line in (tmp_path / "clean" / "dropped.jsonl").read_text().splitlines()]
    assert [(row["split"], row["document"]) for row in rows] == [tuple(f.place) for f in found]
    assert not find_repeats(tmp_path / "clean", spec)
    with pytest.raises(DataError, match="clean: not empty; name a new folder"):
        write_clean(folder, tmp_path / "clean", spec, found)


def test_a_clean_dataset_is_never_input(tmp_path: Path) -> None:
    folder = dataset_of(tmp_path, [text_of(seed) for seed in range(9)])
    write_clean(
        folder, tmp_path / "clean", CleanSpec(), [Repeat(DocumentPlace("train", 0), 9, "exact copy", None, 1.0)]
    )
    assert [file.name for file in match_files([f"{tmp_path}/**/*.jsonl"])] == ["a.jsonl"]


def test_figures_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": "abab"}\n{broken\n{"no": 1}\n{"text": null}\n{x\n')
    spec = BuildSpec(vocab_size=260, validation_fraction=0)
    build(match_files([f"{tmp_path}/a.jsonl"]), spec, tmp_path / "data")
    found = split_figures(tmp_path / "data", "train")
    assert found.sizes.tolist() == [3, 5]
    assert (found.tokens, found.bytes, found.unused) == (8, 6, 257)
    assert sorted(found.counts[found.counts > 0].tolist()) == [2, 3, 3]
    assert found.entropy == pytest.approx(-(0.25 * np.log(0.25) + 2 * 0.375 * np.log(0.375)))
    assert [found.quantile(share) for share in (0.5, 1.0)] == [5, 5]
    assert (found.in_longer(3), found.in_longer(2), found.in_longer(9)) == (5 / 8, 1.0, 0.0)
    assert by_length(found.sizes) == {"1+": (0.5, 3 / 8), "4+": (0.5, 5 / 8)}
    assert split_figures(tmp_path / "data", "val").quantile(0.5) == 0
    assert quarantined_by_reason(tmp_path / "data") == {"not JSON": 2, "no field 'text'": 1, "'text' is null": 1}


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasketch")
    monkeypatch.chdir(tmp_path)
    texts = [text_of(seed) for seed in range(30)]
    dataset_of(tmp_path, [*texts, texts[3], changed(texts[5], 4)])
    run = CliRunner()
    shown = run.invoke(app, ["data", "dedup", "data", "--out", "clean"])
    assert shown.exit_code == 0, shown.output
    assert "near copy of" in shown.output
    assert "dropped.jsonl" in shown.output
    total = Dataset.load(Path("data")).train.documents + Dataset.load(Path("data")).val.documents
    clean = Dataset.load(Path("clean"))
    assert clean.train.documents + clean.val.documents == total - 2
    asked = ["--similarity", "0.9", "--ngram", "7", "--quoted", "0.25"]
    assert run.invoke(app, ["data", "dedup", "data", "--out", "other", *asked]).exit_code == 0
    recipe = Dataset.load(Path("other")).recipe
    assert [recipe[f"dedup_{name}"] for name in ("similarity", "ngram", "quoted")] == [0.9, 7, 0.25]
    stats = run.invoke(app, ["data", "stats", "clean", "--html", "stats.html"])
    assert stats.exit_code == 0, stats.output
    assert f"{clean.train.tokens:,}" in stats.output
    page = Path("stats.html").read_text()
    assert page.count("<svg") == 3
    assert f"{clean.train.tokens:,}" in page
    for words, complaint in (
        (["stats", "none"], "dryvine data stats: none: no finished dataset here"),
        (["dedup", "none"], "dryvine data dedup: none: no finished dataset here"),
        (["dedup", "data", "--out", "clean"], "not empty"),
    ):
        refused = run.invoke(app, ["data", *words])
        assert refused.exit_code == 2
        assert complaint in " ".join(refused.output.split())
