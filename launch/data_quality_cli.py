"""`dryvine data stats` and `dryvine data dedup`: statistics of a dataset, and its copies and quotes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn
from rich.table import Table
from tokenizers import Tokenizer

from dryvine.launch.data_cli import errors_in_one_line, progress_bar
from dryvine.launch.pages import plots
from dryvine.launch.pages.page import cards, heading, page, paragraph, picture, table
from dryvine.launch.pages.plots import Curve
from dryvine.trainer.data.atomic import write_atomically
from dryvine.trainer.data.dataset import SplitName
from dryvine.trainer.data.quality.clean import CleanSpec, find_repeats, write_clean
from dryvine.trainer.data.quality.documents import DocumentPlace, Repeat, splits_of
from dryvine.trainer.data.quality.figures import SplitFigures, by_length, quarantined_by_reason, split_figures
from dryvine.trainer.data.shards import SPLITS

DEFAULTS = CleanSpec()
_LENGTHS = (4096, 32768, 131072)  # of DeepSeek-V3's three stages
_EXAMPLES, _EXAMPLE_TOKENS = 5, 24


def stats(
    source: Annotated[Path, typer.Argument(help="A dataset folder.")],
    html: Annotated[Path | None, typer.Option(help="Write a page with plots to this file.")] = None,
) -> None:
    """Lengths of documents, use of the vocabulary, and why lines were left out."""
    with errors_in_one_line(Console(stderr=True), "stats"):
        figures = [split_figures(source, split) for split in SPLITS]
        reasons = quarantined_by_reason(source)
        rows = dict(_rows(figures))
        shown = Table("", *(found.split for found in figures), title=str(source))
        for name, values in rows.items():
            shown.add_row(name, *values)
        Console().print(shown)
        for reason, count in reasons.most_common():
            print(f"left out: {count:,} x {reason}")
        if html:
            write_atomically(html, page(f"Dataset {source}", _page(figures, rows, reasons)))
            print(f"wrote {html}")


def _rows(figures: Sequence[SplitFigures]) -> Iterator[tuple[str, list[str]]]:
    yield "documents", [f"{found.sizes.size:,}" for found in figures]
    yield "tokens", [f"{found.tokens:,}" for found in figures]
    yield "bytes a token", [f"{found.bytes / found.tokens:.2f}" if found.tokens else "-" for found in figures]
    for share, name in ((0.5, "median"), (0.9, "90%"), (0.99, "99%"), (1.0, "longest")):
        yield f"tokens of a document, {name}", [f"{found.quantile(share):,}" for found in figures]
    for length in _LENGTHS:
        yield f"tokens in documents over {length:,}", [f"{found.in_longer(length):.1%}" for found in figures]
    yield "token ids that never come", [f"{found.unused:,} of {found.counts.size:,}" for found in figures]
    yield "entropy of single tokens", [f"{found.entropy:.3f} nats" for found in figures]


def _page(figures: Sequence[SplitFigures], rows: dict[str, list[str]], reasons: Counter[str]) -> Iterator[str]:
    train = figures[0]
    yield cards({name: values[0] for name, values in itertools.islice(rows.items(), 4)})
    yield table(("", *(found.split for found in figures)), [(name, *values) for name, values in rows.items()])
    yield heading("Length of documents")
    yield paragraph("Each bar is a range of lengths in tokens, from the number under it to the next.")
    shares = by_length(train.sizes)
    for index, what in enumerate(("documents", "tokens")):
        bars = {length: {what: share[index]} for length, share in shares.items()}
        yield picture(plots.bars(bars, f"share of {what}"), f"share of training {what} by length of the document")
    yield heading("Use of the vocabulary")
    yield paragraph(
        "Tokens from the most to the least frequent. Rows of the embedding at a long flat end learn little."
    )
    curves: dict[str, Curve] = {found.split: _by_rank(found) for found in figures if found.tokens}
    yield picture(plots.lines(curves, "rank of the token", "share of all", log=True), "frequency of tokens by rank")
    if reasons:
        yield heading("Left out")
        yield table(("reason", "lines"), [(reason, f"{count:,}") for reason, count in reasons.most_common()])


def _by_rank(found: SplitFigures) -> Curve:
    """About 200 points at most, evenly spaced in the logarithm of the rank."""
    ranked = sorted((count for count in found.counts.tolist() if count), reverse=True)
    ranks = sorted({min(len(ranked), round(1.06**step)) for step in range(210)})
    return Curve(ranks, [ranked[rank - 1] / found.tokens for rank in ranks])


def dedup(
    source: Annotated[Path, typer.Argument(help="A dataset folder.")],
    out: Annotated[Path | None, typer.Option(help="Write the dataset without them into this new folder.")] = None,
    similarity: Annotated[
        float, typer.Option(min=0.1, max=0.95, help="Of a near copy: Jaccard, of 5-grams of tokens.")
    ] = DEFAULTS.similarity,
    ngram: Annotated[int, typer.Option(min=2, help="Tokens of an n-gram that counts as quoted.")] = DEFAULTS.ngram,
    quoted: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of a validation document's n-grams in training text.")
    ] = DEFAULTS.quoted,
) -> None:
    """Find exact and near copies inside and across the splits, and validation text that training text quotes."""
    console = Console(stderr=True)
    with errors_in_one_line(console, "dedup"):
        spec = CleanSpec(similarity=similarity, ngram=ngram, quoted=quoted)
        with progress_bar(console, MofNCompleteColumn()) as on_progress:
            repeats = find_repeats(source, spec, on_progress)
        _report(source, repeats)
        if out:
            after = write_clean(source, out, spec, repeats)
            print(f"wrote {out}: {after.train.documents:,} + {after.val.documents:,} documents; list: dropped.jsonl")


def _report(source: Path, repeats: Sequence[Repeat]) -> None:
    splits = splits_of(source)
    shown = Table("what", "in", "of", "documents", "tokens", "of the split", title=str(source))
    groups: dict[tuple[str, SplitName, SplitName], list[Repeat]] = {}
    for repeat in repeats:
        of: SplitName = repeat.of.split if repeat.of else "train"
        groups.setdefault((repeat.what, repeat.place.split, of), []).append(repeat)
    for (what, name, of), found in sorted(groups.items()):
        tokens = sum(repeat.tokens for repeat in found)
        share = tokens / len(splits[found[0].place.split].packed)
        shown.add_row(what, name, of, f"{len(found):,}", f"{tokens:,}", f"{share:.2%}")
    Console().print(shown)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    for found in groups.values():
        for repeat in found[:_EXAMPLES]:
            ids = splits[repeat.place.split].tokens(repeat.place.number)[:_EXAMPLE_TOKENS].tolist()
            print(f"{_named(repeat.place)}: {_says(repeat)}: {tokenizer.decode(ids)!r}")


def _named(place: DocumentPlace) -> str:
    return f"{place.split} document {place.number:,}"


def _says(repeat: Repeat) -> str:
    if repeat.of is None:
        return f"{repeat.share:.0%} quoted in train"
    return f"{repeat.what} of {_named(repeat.of)}" + (f" ({repeat.share:.0%})" if repeat.share < 1 else "")
