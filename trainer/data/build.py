"""Files in, dataset folder out: one pass to learn the vocabulary (unless it is given), one to tokenize and pack.

Memory is bounded by a batch of text, not by any file; the tokenizer uses every core through its own threads. A build
may be killed at any instant and run again: it goes on after the last whole shard, and the folder ends up the same to
the byte. `dataset.json` comes last, so that no reader ever sees a half-built folder, and a lock lets any number of
processes ask for the same dataset at once: one builds, the others wait for it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, Field

from dryvine.trainer.data import fim, tokenizer
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import FORMAT, Dataset, dtype_for
from dryvine.trainer.data.draw import draw
from dryvine.trainer.data.inputs import Input
from dryvine.trainer.data.shards import Part, Progress, write_whole
from dryvine.trainer.data.stream import Item, Place, batches, items

Tick = Callable[[str, int, int], None]  # what is being done, bytes of input done, bytes of input in all


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """How text becomes a dataset. With the names and sizes of the inputs, it decides every byte of it."""

    vocab_size: int | None = Field(default=None, ge=260)  # None: that of `tokenizer`
    tokenizer: Path | None = None  # a tokenizer.json; None: learn one
    field: str = "text"
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    fim_rate: float = Field(default=0.0, ge=0, le=1)
    shard_tokens: int = Field(default=2**26, gt=0)  # a kill loses one shard's work, about a minute of it
    sample_bytes: int = Field(default=2**28, gt=0)  # of text to learn the vocabulary from


def check(recipe: Recipe) -> None:
    """Raise DataError for a recipe that cannot be followed, before anything is written."""
    if not recipe.tokenizer:
        return
    given = tokenizer.load(recipe.tokenizer)
    if recipe.vocab_size not in (None, given.size):
        raise DataError(f"--vocab-size {recipe.vocab_size}: {recipe.tokenizer} has {given.size} ids; leave one out")
    if recipe.fim_rate and not given.fim:
        raise DataError(f"--fim-rate: {recipe.tokenizer} lacks {' '.join(tokenizer.FIM)}; add them, or leave it out")


def silent(what: str, done: int, total: int) -> None:
    """The Tick of those who do not watch."""


def fingerprint(inputs: Sequence[Input], recipe: Recipe) -> str:
    """Equal for equal data: on any machine, wherever the files and the tokenizer lie."""
    given = hashlib.sha256(recipe.tokenizer.read_bytes()).hexdigest() if recipe.tokenizer else None
    described = [FORMAT, recipe.model_dump(exclude={"tokenizer"}), given, [(file.name, file.size) for file in inputs]]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def build(inputs: Sequence[Input], recipe: Recipe, out: Path, tick: Tick = silent, deadline: float = 0) -> Dataset:
    """Make the dataset in `out`, go on with one that was interrupted, or return one that is done.

    If another process is building there, waits up to `deadline` seconds for it. Raises DataError if it takes longer, if
    `out` holds anything built otherwise, or if the inputs hold no text.
    """
    check(recipe)
    mark = fingerprint(inputs, recipe)
    if done := _finished(out, mark):
        return done
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=deadline):
            return _finished(out, mark) or _build(inputs, recipe, out, mark, tick)
    except Timeout:
        raise DataError(f"{out}: another process is building here, for {deadline:.0f} s now; wait, or end it") from None


def _finished(out: Path, mark: str) -> Dataset | None:
    if not (out / "dataset.json").exists():
        return None
    dataset = Dataset.load(out)
    if dataset.fingerprint != mark:
        raise DataError(f"{out}: holds a dataset of other files or settings; build into another folder, or delete it")
    return dataset


def _build(inputs: Sequence[Input], recipe: Recipe, out: Path, mark: str, tick: Tick) -> Dataset:
    progress = _resume(out, mark, inputs)
    vocabulary = _vocabulary(inputs, recipe, out, tick)
    progress = _tokenize(inputs, recipe, vocabulary, out, progress, tick)
    if not progress.train.documents:
        for name in ("progress.json", "tokenizer.json"):
            (out / name).unlink()
        raise DataError(
            f"{out}: no text to train on in {len(inputs)} files, {progress.quarantined} lines skipped "
            "(quarantine.jsonl says why); check --text and --field"
        )
    dataset = Dataset(
        fingerprint=mark,
        tokenizer_sha256=vocabulary.sha256,
        vocab_size=vocabulary.size,
        end_token=vocabulary.end,
        dtype=dtype_for(vocabulary.size),
        recipe=recipe.model_dump(mode="json"),
        quarantined=progress.quarantined,
        train=progress.train,
        val=progress.val,
    )
    write_whole(out / "dataset.json", dataset.model_dump_json(indent=1))
    (out / "progress.json").unlink()
    return dataset


def _resume(out: Path, mark: str, inputs: Sequence[Input]) -> Progress:
    path = out / "progress.json"
    if path.exists():
        progress = Progress.model_validate_json(path.read_bytes())
        if progress.fingerprint != mark:
            raise DataError(f"{out}: half-built from other files or settings; build into another folder, or delete it")
        return progress
    progress = Progress(fingerprint=mark)
    (out / "tokenizer.json").unlink(missing_ok=True)
    write_whole(out / "inputs.json", json.dumps([{"file": str(i.path), "bytes": i.size} for i in inputs], indent=0))
    write_whole(path, progress.model_dump_json())
    return progress


def _vocabulary(inputs: Sequence[Input], recipe: Recipe, out: Path, tick: Tick) -> tokenizer.Vocabulary:
    """The tokenizer of this build, in the folder before the first token is."""
    path = out / "tokenizer.json"
    if not path.exists():
        write_whole(path, _given(recipe) or _learned(inputs, recipe, tick))
    return tokenizer.load(path)


def _given(recipe: Recipe) -> str | None:
    return recipe.tokenizer.read_bytes().decode() if recipe.tokenizer else None


def _learned(inputs: Sequence[Input], recipe: Recipe, tick: Tick) -> str:
    assert recipe.vocab_size, "a recipe names a tokenizer or the size of one"
    return tokenizer.train(_sample(inputs, recipe, tick), recipe.vocab_size).to_str(pretty=True)


def _held_out(item: Item, recipe: Recipe) -> bool:
    return draw("split", item.key) < recipe.validation_fraction


def _sample(inputs: Sequence[Input], recipe: Recipe, tick: Tick) -> Iterator[str]:
    """Training text from all over the inputs, about `sample_bytes` of it."""
    starts = [0, *itertools.accumulate(file.size for file in inputs)]
    rate = recipe.sample_bytes / max(starts[-1], 1)
    for item in items(inputs, recipe.field, Place()):
        piece = item.key + f" {item.after.byte}".encode()
        if not _held_out(item, recipe) and draw("sample", piece) < rate:
            yield item.record.text
        tick("learning the vocabulary", starts[item.after.file] + item.after.byte, starts[-1])


def _tokenize(
    inputs: Sequence[Input],
    recipe: Recipe,
    vocabulary: tokenizer.Vocabulary,
    out: Path,
    progress: Progress,
    tick: Tick,
) -> Progress:
    starts = [0, *itertools.accumulate(file.size for file in inputs)]
    work = batches(items(inputs, recipe.field, progress.place))
    while progress.place.file < len(inputs):
        with Part(out, progress, dtype_for(vocabulary.size)) as part:
            for batch in work:
                _pack(batch, recipe, vocabulary, part)
                place = batch[-1].after
                tick("tokenizing", starts[place.file] + place.byte, starts[-1])
                if part.tokens >= recipe.shard_tokens:
                    break
            else:
                place = Place(len(inputs))
            progress = part.commit(place)
    return progress


def _pack(batch: Sequence[Item], recipe: Recipe, vocabulary: tokenizer.Vocabulary, part: Part) -> None:
    """Tokenize a batch in one call, over all cores, and add each document with its end token to its split."""
    arranged = [_arrange(item, recipe, vocabulary) for item in batch]
    texts = [text for parts in arranged for _, text in parts]
    encoded = iter(vocabulary.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    for item, parts in zip(batch, arranged, strict=True):
        part.skip(item)
        ids: list[int] = []
        for mark, _ in parts:
            ids += ([] if mark is None else [mark]) + next(encoded).ids
        if parts:
            ends = item.record.ends
            writer = part.val if _held_out(item, recipe) else part.train
            writer.add(ids + [vocabulary.end] * ends, item.size, ends)


def _arrange(item: Item, recipe: Recipe, vocabulary: tokenizer.Vocabulary) -> tuple[fim.Part, ...]:
    """What a record adds to its document: nothing where it was only broken. Validation text stays as it was written."""
    record = item.record
    whole = record.starts and record.ends
    if whole and not record.text:
        return ()
    rate = recipe.fim_rate if whole and not _held_out(item, recipe) else 0.0
    return fim.arrange(record.text, item.key, rate, vocabulary)
