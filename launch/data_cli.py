"""`dryvine data build`: the user's own text files into a dataset folder, with a progress bar and a table at the end."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dryvine.trainer.data.build import build as build_dataset
from dryvine.trainer.data.config import DataConfig, DataError
from dryvine.trainer.data.dataset import Dataset
from dryvine.trainer.data.inputs import match_files, printable
from dryvine.trainer.data.megatron import write_megatron
from dryvine.trainer.data.shards import SPLITS
from dryvine.trainer.data.spec import BuildSpec, OnProgress

app = typer.Typer(help="Datasets: text files into packed tokens.", no_args_is_help=True)

VOCAB_SIZE = DataConfig.model_fields["vocab_size"].default
VAL_FRACTION = DataConfig.model_fields["validation_fraction"].default


TEXT_HELP = (
    "Pattern of .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .arrow files, @FILE with a path on each line, or "
    "hf://datasets/OWNER/NAME/PATTERN; may be repeated."
)


@app.command()
def build(
    text: Annotated[
        list[str],
        typer.Option(help=TEXT_HELP),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the dataset. An interrupted build there is continued.")],
    vocab_size: Annotated[
        int | None, typer.Option(min=260, help=f"Size of the tokenizer to learn.  [default: {VOCAB_SIZE}]")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json to use instead.")] = None,
    field: Annotated[
        str, typer.Option(help="Field or column that holds the text; meta.text leads into objects.")
    ] = "text",
    where: Annotated[
        list[str] | None, typer.Option(help="Only records that meet it: lang=en, meta.score>=0.5.")
    ] = None,
    val_fraction: Annotated[float, typer.Option(min=0, max=0.99, help="Of documents, held out.")] = 0.05,
    fim_rate: Annotated[float, typer.Option(min=0, max=1, help="Of documents, put fill-in-the-middle.")] = 0.0,
    processes: Annotated[
        int | None, typer.Option(min=1, help="That tokenize; any number gives the same bytes.  [default: one a core]")
    ] = None,
    # The shell turns an unquoted pattern into many files; all but the first arrive here.
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
) -> None:
    """Tokenize text files into a dataset that `data.source` of a config names.

    A .txt is one document, a .jsonl or .parquet has one in each line or row. A broken line is skipped and listed in
    OUT/quarantine.jsonl. After a kill, the same command continues where the build was.
    """
    console = Console(stderr=True)
    with errors_in_one_line(console):
        spec = BuildSpec(
            vocab_size=vocab_size if vocab_size or tokenizer else VOCAB_SIZE,
            tokenizer=tokenizer,
            field=field,
            where=tuple(where or ()),
            validation_fraction=val_fraction,
            fim_rate=fim_rate,
        )
        inputs = match_files([*text, *(more or [])])
        with progress_bar(console) as on_progress:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            dataset = build_dataset(inputs, spec, out, on_progress, processes=processes or cores)
    report(dataset, out, Console())


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A dataset folder.")],
    out: Annotated[Path, typer.Option(help="Prefix: PREFIX_train.bin and .idx are written, and PREFIX_val.")],
) -> None:
    """Write a dataset as Megatron's .bin/.idx, a document a sequence."""
    with errors_in_one_line(Console(stderr=True), "export"):
        for split in SPLITS:
            if Dataset.load(source).split(split).tokens:
                prefix = out.with_name(f"{out.name}_{split}")
                documents = write_megatron(source, split, prefix)
                print(f"{prefix}.bin, .idx: {documents:,} documents")


@contextmanager
def errors_in_one_line(console: Console, command: str = "build") -> Iterator[None]:
    """Print a user error in one line and exit with 2, or with 130 after Ctrl-C, as shells do."""
    try:
        yield
    except (DataError, OSError) as error:
        console.print(printable(f"dryvine data {command}: {error}"), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        goes_on = " The same command continues after the last whole shard." if command == "build" else ""
        console.print(f"Interrupted.{goes_on}")
        raise typer.Exit(130) from None


@contextmanager
def progress_bar(console: Console, counted: ProgressColumn | None = None) -> Iterator[OnProgress]:
    """A progress bar with a row for each pass over the inputs, added at the pass's first report. Counts bytes unless
    `counted` is another column."""
    rows: dict[str, TaskID] = {}
    columns = TextColumn("{task.description}"), BarColumn(), counted or DownloadColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console)

    def on_progress(stage: str, done: int, total: int) -> None:
        if not rows:
            bar.start()
        if stage not in rows:
            rows[stage] = bar.add_task(stage)
        bar.update(rows[stage], completed=done, total=total)

    try:
        yield on_progress
    finally:
        if rows:  # where there was nothing to report, it would print an empty line
            bar.stop()


def report(dataset: Dataset, folder: Path, console: Console) -> None:
    """Print documents, tokens and bytes per token of each split, then what was skipped and how to train on this."""
    table = Table("split", title=Text(printable(str(folder))))
    for column in ("documents", "tokens", "bytes", "bytes/token"):
        table.add_column(column, justify="right")
    for name, split in (("train", dataset.train), ("val", dataset.val)):
        density = f"{split.bytes / split.tokens:.2f}" if split.tokens else "-"
        table.add_row(name, f"{split.documents:,}", f"{split.tokens:,}", f"{split.bytes:,}", density)
    console.print(table)
    console.print(printable("\n".join(_notes(dataset, folder))), markup=False, highlight=False, soft_wrap=True)


def _notes(dataset: Dataset, folder: Path) -> Iterator[str]:
    quarantine = folder / "quarantine.jsonl"
    yield f"{dataset.quarantined:,} broken lines skipped" + (f", listed in {quarantine}" if dataset.quarantined else "")
    with quarantine.open() as lines:
        for entry in map(json.loads, itertools.islice(lines, 3)):
            yield f"  {entry['file']}:{entry['line']}: {entry['reason']}"
    if not dataset.val.documents:
        yield "No document was held out: split the text into more files, or raise --val-fraction."
    yield f'Train on it: data.source="{folder}" data.vocab_size={dataset.vocab_size}'
