"""A model opened for a command: the options that say which and how, and what is refused before a weight is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer
from rich.console import Console

from dryvine.launch.data_cli import progress_bar

if TYPE_CHECKING:
    from dryvine.trainer.generate.open import WeightSource
    from dryvine.trainer.generate.paged import ExpertPages
    from dryvine.trainer.generate.sampler import Sampler
    from dryvine.trainer.hand_off.tokenizer_files import TokenizerFiles

Model = Annotated[
    str, typer.Argument(help="A run folder, RUN@STEP, or a folder of exported or released weights.", show_default=False)
]
Dtype = Annotated[
    Literal["auto", "fp32", "bf16", "int8"],
    typer.Option(help="auto: bf16 on a GPU, fp32 on a CPU. int8: weights in 8 bits, on a CPU."),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option()]
ExpertMemory = Annotated[
    str, typer.Option(help="2GiB, 500MB: read experts when they are asked for, and keep so much of them. CPU only.")
]
Speculate = Annotated[
    bool, typer.Option("--speculate", help="Let the model's MTP guess tokens ahead: the same tokens in fewer steps.")
]
Tokenizer = Annotated[Path | None, typer.Option(help="A tokenizer.json, or its folder.  [default: the model's]")]


class HowToCompute(NamedTuple):
    """Options that say how to compute."""

    dtype: str
    device: str
    expert_memory: str
    speculate: bool = False


class Opened(NamedTuple):
    """A loaded model with its tokenizer."""

    source: WeightSource
    sampler: Sampler
    files: TokenizerFiles
    pages: ExpertPages | None
    dtype: str  # fp32, bf16 or int8


def open_model(model: str, ways: HowToCompute, tokenizer: Path | None) -> Opened:
    """Load a model. Errors that can be found without reading weights are raised first."""
    import torch

    from dryvine.trainer.generate.open import load, open_weights
    from dryvine.trainer.generate.paged import ExpertPages, paged_experts
    from dryvine.trainer.generate.sampler import Sampler

    memory = _bytes(ways.expert_memory) if ways.expert_memory else None
    cpu_only = {"--expert-memory": memory is not None, "--dtype int8": ways.dtype == "int8"}
    asked = [option for option, given in cpu_only.items() if given]
    on_gpu = ways.device == "cuda" or (ways.device == "auto" and torch.cuda.is_available() and not asked)
    if on_gpu and asked:
        raise typer.BadParameter(f"{asked[0]} is for a CPU: add --device cpu")
    dtype = ways.dtype if ways.dtype != "auto" else "bf16" if on_gpu else "fp32"
    numbers = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[dtype]
    source = open_weights(model, ways.speculate)
    files = source.tokenizer(tokenizer)
    pages = None if memory is None else ExpertPages(source, numbers, memory)
    with progress_bar(Console(stderr=True)) as on_progress:
        loaded = load(source, numbers, torch.device("cuda" if on_gpu else "cpu"), on_progress, experts=pages is None)
    experts = None if pages is None else paged_experts(loaded, pages)
    sampler = Sampler.alone(loaded, experts=experts, speculate=ways.speculate)
    return Opened(source, sampler, files, pages, dtype)


def _bytes(text: str) -> int:
    """Parse 2GiB, 500MB, 1e9. Raises BadParameter."""
    found = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*(?:([KMGT])(i?)B?|B)?", text.strip(), re.IGNORECASE)
    try:
        number, unit, binary = float(found[1]), found[2], found[3]  # type: ignore[index]
    except (TypeError, ValueError):
        raise typer.BadParameter(f"--expert-memory {text!r}: write 2GiB or 500MB") from None
    power = "KMGT".index(unit.upper()) + 1 if unit else 0
    return int(number * (1024 if binary else 1000) ** power)
