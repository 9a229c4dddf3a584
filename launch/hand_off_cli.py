"""`dryvine export` and `dryvine import`: checkpoints to and from the formats of other programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dryvine.launch.data_cli import progress_bar

RunArgument = Annotated[str, typer.Argument(help="A run folder, or RUN@STEP.", show_default=False)]
Format = Annotated[Literal["hf", "gguf"], typer.Option(help="hf: transformers, vLLM. gguf: llama.cpp, ollama.")]
Dtype = Annotated[
    Literal["fp32", "bf16", "fp8-block", "int8", "int4"],
    typer.Option(help="Numbers of --format hf. int8, int4: for dryvine generate, chat and eval alone."),
]
Quant = Annotated[Literal["f32", "bf16", "f16", "q8_0", "q4_k"], typer.Option(help="Numbers of --format gguf.")]
Ragged = Annotated[
    bool, typer.Option("--ragged", help="fp8-block also where blocks of 128 do not divide; transformers misreads it.")
]
Tokenizer = Annotated[Path | None, typer.Option(help="A tokenizer.json, or its folder.  [default: the run's]")]
Check = Annotated[bool, typer.Option("--check", help="Compare what readers compute of OUT with our own forward.")]
Template = Annotated[Path | None, typer.Option(help="A chat template.  [default: the tokenizer's, or a plain one]")]


def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    format: Format = "hf",
    dtype: Dtype = "bf16",
    quant: Quant = "bf16",
    ragged: Ragged = False,
    tokenizer: Tokenizer = None,
    chat_template: Template = None,
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Size of a safetensors file.")] = 5.0,
    check: Check = False,
    text: Annotated[Path | None, typer.Option(help="Text for --check.  [default: a module of Python]")] = None,
) -> None:
    """Write a checkpoint as transformers and vLLM (hf), llama.cpp and ollama (gguf) open it.

    With --check, OUT is opened with those of them that are installed, and their log-probabilities are compared with our
    own; exit code 1 if they differ by more than arithmetic explains. An OUT that is there already is then only checked.
    """
    from dryvine.trainer.hand_off.commands import ExportAs, check_export, export_run
    from dryvine.trainer.hand_off.run_files import open_run

    ways = ExportAs(format, dtype, quant, ragged, tokenizer, chat_template, int(shard_gb * 1e9))
    with _refused_in_one_line():
        opened = open_run(run)
        if not (check and out.exists()):
            with progress_bar(Console(stderr=True)) as on_progress:
                export_run(opened, out, ways, on_progress)
        if check and not check_export(opened, out, ways, text, Console()):
            raise typer.Exit(1)


def import_(
    folder: Annotated[Path, typer.Argument(help="A released DeepSeek-V2 or V3 checkpoint.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The run folder to make.")],
    optimizer_from: Annotated[
        str | None, typer.Option(help="RUN[@STEP] that the weights were exported from: keep its optimizer and step.")
    ] = None,
) -> None:
    """Make a run folder of released weights (safetensors: FP32, BF16, FP16 or FP8 in blocks of 128 x 128), with a
    checkpoint that every layout loads and `model.toml`, the [model] table for a config to extend."""
    from dryvine.trainer.hand_off.import_hf import import_hf
    from dryvine.trainer.hand_off.run_files import open_run

    with _refused_in_one_line():
        optimizer = open_run(optimizer_from) if optimizer_from else None
        with progress_bar(Console(stderr=True)) as on_progress:
            made = import_hf(folder, out, optimizer, on_progress)
    for line in made.report(out):
        print(line)


@contextmanager
def _refused_in_one_line() -> Iterator[None]:
    """Turn errors of files that are read into user errors of one line, which `main` prints."""
    from dryvine.trainer.data.atomic import CannotWrite
    from dryvine.trainer.hand_off.errors import HandOffError

    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        raise HandOffError(str(error)) from None
