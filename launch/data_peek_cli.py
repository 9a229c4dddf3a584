"""`dryvine data peek`: sequences of a run as the model will see them, or records of text files before a build."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dryvine.launch.data_cli import TEXT_HELP, VAL_FRACTION, errors_in_one_line
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import SplitName
from dryvine.trainer.data.inputs import match_files, printable
from dryvine.trainer.data.megatron import MegatronTokens, megatron_prefix
from dryvine.trainer.data.peek import RecordText, pieces, records, tokenizer_of
from dryvine.trainer.data.shards import SPLITS
from dryvine.trainer.data.source import TokenSource
from dryvine.trainer.data.spec import BuildSpec

_SHOWN_CHARACTERS = 2000  # of a record


def peek(
    source: Annotated[Path | None, typer.Argument(help="A dataset folder, or a Megatron prefix.")] = None,
    text: Annotated[list[str] | None, typer.Option(help=f"In place of SOURCE, before a build. {TEXT_HELP}")] = None,
    split: Annotated[str, typer.Option(help="train or val")] = "train",
    first: Annotated[int, typer.Option(min=0, help="Number of the sequence in the run, or of the record.")] = 0,
    sequences: Annotated[int, typer.Option(min=1, help="How many sequences or records.")] = 1,
    seq_len: Annotated[int, typer.Option(min=1, help="As data.seq_len of the run.")] = 512,
    seed: Annotated[int, typer.Option(help="As run.seed.")] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer.json of a Megatron prefix, or of the build to come.")
    ] = None,
    field: Annotated[str, typer.Option(help="With --text: as of `dryvine data build`.")] = "text",
    where: Annotated[list[str] | None, typer.Option(help="With --text: as of `dryvine data build`.")] = None,
) -> None:
    """Show sequences of a run as the model will see them: cut, packed and with special tokens spelled out.

    With --text: records of files as a build would read them, those that it would leave out with the reason.
    """
    with errors_in_one_line(Console(stderr=True), "peek"):
        if (source is None) == (not text):
            raise DataError("name a dataset folder, or files with --text; not both")
        if text:
            spec = BuildSpec(tokenizer=tokenizer, field=field, where=tuple(where or ()))
            _show_records(text, spec, first, sequences)
        elif source:
            name = _split_name(split)
            found = TokenSource(_line(source, name, tokenizer), name, seq_len, extra=1, seed=seed)
            _show_sequences(found, range(first, first + sequences), tokenizer or source / "tokenizer.json")


def _line(source: Path, split: SplitName, tokenizer: Path | None) -> Path | MegatronTokens:
    prefix = megatron_prefix(source)
    if prefix and not tokenizer:
        raise DataError(f"{source}: Megatron's files have no tokenizer; name it with --tokenizer tokenizer.json")
    return MegatronTokens(prefix, split, VAL_FRACTION) if prefix else source


def _split_name(name: str) -> SplitName:
    """The split of that name. Raises DataError if there is none."""
    for split in SPLITS:
        if name == split:
            return split
    raise DataError(f"--split {name}: there are {' and '.join(SPLITS)}")


def _show_sequences(source: TokenSource, numbers: range, tokenizer_file: Path) -> None:
    out, decode = Console(), tokenizer_of(tokenizer_file)
    for number in numbers:
        out.rule(f"sequence {number}: {source.seq_len} tokens")
        for piece in pieces(source, number, source.seq_len, decode):
            out.print(f"document {piece.document}, {piece.tokens} tokens", style="bold cyan")
            out.print(piece.text, markup=False, highlight=False, soft_wrap=True)
            if not piece.ends:
                out.print("(goes on)", style="cyan")


def _show_records(patterns: list[str], spec: BuildSpec, first: int, count: int) -> None:
    out, shown = Console(), 0
    for record in itertools.islice(records(match_files(patterns), spec), first, first + count):
        _show(record, out)
        shown += 1
    if not shown:
        raise DataError(f"--first {first}: the files have fewer records")


def _show(record: RecordText, out: Console) -> None:
    out.rule(printable(record.place), characters="-")
    for broken in record.broken:
        out.print(f"left out: line {broken.line}: {broken.reason}", style="red", markup=False, soft_wrap=True)
    if not record.text:
        if not record.broken:
            out.print("not wanted by --where, or empty", style="cyan")
        return
    tokens = "" if record.tokens is None else f", {record.tokens:,} tokens"
    split = "validation" if record.held_out else "training"
    out.print(f"{split}, {len(record.text):,} characters{tokens}", style="bold cyan")
    out.print(record.text[:_SHOWN_CHARACTERS], markup=False, highlight=False, soft_wrap=True)
    if len(record.text) > _SHOWN_CHARACTERS or not record.ends:
        out.print("(goes on)", style="cyan")
