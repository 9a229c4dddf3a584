"""`dryvine prune`: a run folder with fewer experts in each layer, by how they are used."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dryvine.launch.data_cli import progress_bar
from dryvine.launch.open_model import Model, Tokenizer

TEXT_HELP = 'A .jsonl file with {"text": "..."} on each line: the texts on which use is measured.'


def prune(
    model: Model,
    out: Annotated[Path, typer.Option(help="The run folder to make.")],
    keep: Annotated[int, typer.Option(min=1, help="Experts that stay in each layer.")],
    text: Annotated[Path, typer.Option(help=TEXT_HELP)],
    merge: Annotated[bool, typer.Option("--merge", help="Merge those that go into the ones most like them.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Lines of --text, from its first.")] = 200,
    tokenizer: Tokenizer = None,
) -> None:
    """Drop the least used experts of every layer, or merge them. OUT is a run that generate, eval, export and
    run.init_from open; MTP is left out. Compare it with `dryvine eval`: nothing here knows what it costs."""
    import torch

    from dryvine.trainer.evaluation.perplexity import windows
    from dryvine.trainer.evaluation.record import read_tasks
    from dryvine.trainer.generate.dialogue import document
    from dryvine.trainer.generate.open import load, open_weights
    from dryvine.trainer.hand_off.run_files import TOKENIZER
    from dryvine.trainer.hand_off.tokenizer_files import copy_released
    from dryvine.trainer.pruning.measure import measure
    from dryvine.trainer.pruning.prune import choose, fewer, write_pruned

    texts = [record.text("text") for record in read_tasks(text, limit).records]
    source = open_weights(model)
    fewer(source.shape, keep)
    files = source.tokenizer(tokenizer)
    with progress_bar(Console(stderr=True)) as bar:
        loaded = load(source, torch.float32, torch.device("cpu"), bar)
    documents = (windows(document(files.vocabulary, one), source.shape.max_position) for one in texts)
    uses = measure(loaded, list(chain.from_iterable(documents)))
    choices = {name: choose(use, keep, merge) for name, use in uses.items()}
    path = write_pruned(loaded, uses, choices, out)
    copy_released(files.folder, out / TOKENIZER)
    table = Table("layer", "dropped", "their share of choices", "merged into", title=str(path))
    for name, choice in choices.items():
        dropped = [x for x in range(source.shape.routed) if x not in choice.kept]
        into = ", ".join(str(choice.into[x]) for x in dropped) if merge else "-"
        table.add_row(name, ", ".join(map(str, dropped)), f"{choice.lost:.1%}", into)
    Console().print(table)
