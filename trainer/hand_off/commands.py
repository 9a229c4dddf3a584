"""What `dryvine export` does, without its options: one `ExportAs` describes the export for writing and for checking."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from torch import Tensor

from dryvine.comm.extras import install
from dryvine.trainer.data.spec import OnProgress
from dryvine.trainer.hand_off import integers
from dryvine.trainer.hand_off.check import ReaderComparison, compare, prompts, table
from dryvine.trainer.hand_off.encodings import Encoding
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.export_hf import export_hf
from dryvine.trainer.hand_off.forward import Forward
from dryvine.trainer.hand_off.hf_config import config_json
from dryvine.trainer.hand_off.names import Mapped
from dryvine.trainer.hand_off.readers import GGUF, READERS, installed
from dryvine.trainer.hand_off.released import open_released
from dryvine.trainer.hand_off.run_files import OpenRun
from dryvine.trainer.hand_off.tokenizer_files import TokenizerFiles, open_tokenizer


class ExportAs(NamedTuple):
    """The format and number types of an export."""

    format: str  # hf or gguf
    dtype: str = "bf16"  # of hf
    quant: str = "bf16"  # of gguf
    ragged: bool = False
    tokenizer: Path | None = None
    chat_template: Path | None = None
    shard_bytes: int = 5_000_000_000

    @property
    def encoding(self) -> Encoding:
        return Encoding(self.dtype, self.ragged)

    @property
    def written_as(self) -> str:
        return self.dtype if self.format == "hf" else self.quant

    def tokenizer_of(self, run: OpenRun) -> TokenizerFiles:
        found = None if self.tokenizer else run.tokenizer()
        chat = run.chat()
        return open_tokenizer(
            found, self.tokenizer, self.chat_template, run.shape.vocab, chat.jinja() if chat else None
        )


def export_run(run: OpenRun, out: Path, ways: ExportAs, on_progress: OnProgress) -> None:
    """Write the export to the new folder `out`. Raises HandOffError."""
    tokenizer = ways.tokenizer_of(run)
    _verify(run, on_progress)
    if ways.format == "hf":
        export_hf(run, out, ways.encoding, tokenizer, on_progress, ways.shard_bytes)
        return
    need_gguf()
    from dryvine.trainer.hand_off.export_gguf import export_gguf

    export_gguf(run, out, ways.quant, tokenizer, on_progress)


def _verify(run: OpenRun, on_progress: OnProgress) -> None:
    """Compare the checkpoint with its checksums, since damaged weights look like any others. Raises HandOffError
    naming the file."""
    done, total = 0, run.stored.bytes
    for size, wrong in run.stored.damage():
        if wrong:
            raise HandOffError(f"{wrong}; export another step")
        done += size
        on_progress("verifying the checkpoint", done, total)


def need_gguf() -> None:
    """Raises HandOffError if the gguf library is missing."""
    if installed("gguf") is None:
        raise HandOffError(f"--format gguf needs the gguf library: {install('gguf')}")


def check_export(run: OpenRun, out: Path, ways: ExportAs, text: Path | None, console: Console) -> bool:
    """Print a table of the readers that are installed. Returns whether all of them agree with our forward; False,
    with the reason printed, if none is installed."""
    if ways.dtype in integers.BITS:
        raise HandOffError(f"--check: no other program opens {ways.dtype}; measure it with dryvine eval")
    check_files(run, out, ways)
    found = [(made, at) for made in READERS[ways.format] if (at := installed(made.package))]
    if not found:
        console.print(f"nothing to check with: pip install {' '.join(made.package for made in READERS[ways.format])}")
        return False
    forward = Forward(run, rounded(run, ways))
    some = prompts(ways.tokenizer_of(run), text, run.shape.max_position)
    comparisons: list[ReaderComparison] = []
    for made, at in found:
        try:
            opened = made(out, ways.written_as)
        except ImportError as error:  # transformers needs accelerate for FP8
            raise HandOffError(f"{made.package}: {error}") from None
        comparisons.append(compare(f"{made.package} {at}", opened, forward.compute, some))
    console.print(table(comparisons, f"{out}: {ways.format}, {ways.written_as}, against our forward in FP32"))
    return all(c.fine for c in comparisons)


def check_files(run: OpenRun, out: Path, ways: ExportAs) -> None:
    """Check that the files are those of this model, before another program opens them. Raises HandOffError."""
    if ways.format == "hf":
        open_released(out)
        # As it stands there: a key that our import can do without may be one that only vLLM reads.
        said = json.loads((out / "config.json").read_bytes())
        for key, wanted in config_json(run.shape).items():
            if key not in said or said[key] != wanted:
                found = f"is {said[key]}" if key in said else "is missing"
                raise HandOffError(f"{out / 'config.json'}: {key}: {found}, and {run.folder} has {wanted}")
        return
    need_gguf()
    from dryvine.trainer.hand_off.export_gguf import plan_gguf
    from dryvine.trainer.hand_off.gguf_header import check_gguf

    check_gguf(out / GGUF, plan_gguf(run, ways.quant, ways.tokenizer_of(run)))


def rounded(run: OpenRun, ways: ExportAs) -> Callable[[Mapped, Tensor], Tensor]:
    """A function from weights to the values that the export's number types leave of them."""
    if ways.format == "hf":
        return ways.encoding.read_back
    need_gguf()
    from dryvine.trainer.hand_off.export_gguf import reader_of

    return reader_of(run.shape, ways.quant)
