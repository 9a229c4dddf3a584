"""What fewer bits and fewer experts cost: size, loss and accuracy of a run and of what is made of it, in one table.

    python -m benchmarks.smaller runs/tiny_cpu --keep 6 --out smaller.json

Texts are of the validation split of the run's own data. Accuracy: which of four continuations of 8 tokens belongs
behind 40 tokens, three of them from elsewhere in the split. Experts are measured on other texts than those that
are scored.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from dryvine.launch.open_model import HowToCompute, open_model
from dryvine.launch.prune_cli import prune
from dryvine.trainer.data.packed_tokens import PackedTokens
from dryvine.trainer.evaluation.kinds import task_of
from dryvine.trainer.evaluation.record import read_tasks
from dryvine.trainer.evaluation.subject import Subject
from dryvine.trainer.hand_off.commands import ExportAs, export_run
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.run_files import OpenRun, open_run
from dryvine.trainer.hand_off.tokenizer_files import open_tokenizer

CHOICES, BEFORE, BEHIND, LONG = 4, 40, 8, 240  # choices; tokens of a prompt, of a choice, of a text


def write_tasks(run: OpenRun, folder: Path, count: int) -> None:
    """texts.jsonl, other.jsonl and choices.jsonl."""
    found = run.tokenizer()
    if found is None:
        raise HandOffError(f"{run.folder}: its dataset is gone")
    vocabulary = open_tokenizer(found, None, None, run.shape.vocab).vocabulary
    packed, draw = PackedTokens(found, "val"), random.Random(0)

    def text(length: int) -> str:
        start = draw.randrange(len(packed) - length)
        return str(vocabulary.tokenizer.decode(packed.tokens(start, length).tolist()))

    def choice() -> dict[str, object]:
        start, answer = draw.randrange(len(packed) - BEFORE - BEHIND), draw.randrange(CHOICES)
        prompt, right = (
            str(vocabulary.tokenizer.decode(packed.tokens(at, size).tolist()))
            for at, size in ((start, BEFORE), (start + BEFORE, BEHIND))
        )
        choices = [right if i == answer else text(BEHIND) for i in range(CHOICES)]
        return {"prompt": prompt, "choices": choices, "answer": answer}

    lines: dict[str, list[dict[str, object]]] = {
        "texts": [{"text": text(LONG)} for _ in range(count)],
        "other": [{"text": text(LONG)} for _ in range(count)],
        "choices": [choice() for _ in range(2 * count)],
    }
    for name, some in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some))


def variants(run: OpenRun, spec: str, folder: Path, keep: int) -> Iterator[tuple[str, str, str]]:
    """Name, and what `open_model` takes: the model, and the dtype to multiply in."""
    for dtype in ("fp32", "bf16", "int8", "int4"):
        export_run(run, folder / dtype, ExportAs("hf", dtype), lambda *_: None)
        yield dtype, str(folder / dtype), "fp32"
    yield "fp32, multiplied in 8 bits", str(folder / "fp32"), "int8"
    text = folder / "other.jsonl"
    for name, number, merge in (
        ("bf16, no groups", run.shape.routed, False),
        (f"bf16, {keep} experts, dropped", keep, False),
        (f"bf16, {keep} experts, merged", keep, True),
    ):
        made = folder / name.replace(" ", "-").replace(",", "")
        prune(spec, made, number, text, merge)
        out = folder / f"{made.name}-bf16"
        export_run(open_run(str(made)), out, ExportAs("hf", "bf16"), lambda *_: None)
        yield name, str(out), "fp32"


def measured(name: str, model: str, dtype: str, folder: Path) -> dict[str, object]:
    opened = open_model(model, HowToCompute(dtype, "cpu", ""), None)
    subject = Subject(opened.source, opened.sampler, opened.files)
    size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    row: dict[str, object] = {"model": name, "bytes": size}
    for task in ("texts", "choices"):
        findings = task_of(read_tasks(folder / f"{task}.jsonl", None).records)(subject, lambda *_: None)
        row |= {figure: findings.figures[figure] for figure in ("loss", "accuracy") if figure in findings.figures}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--keep", type=int, required=True, help="experts of each layer in the smaller models")
    parser.add_argument("--count", type=int, default=100, help="texts, and twice as many choices")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    run = open_run(args.run)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(run, folder, args.count)
        rows = []
        for variant in variants(run, args.run, folder, args.keep):
            rows.append(measured(*variant, folder))
            Console().print(json.dumps(rows[-1]))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
