"""A corpus with files of each kind, and what a build made of one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from dryvine.trainer.data.dataset import SplitName
from dryvine.trainer.data.packed_tokens import PackedTokens

WORDS = ["the", "expert", "token", "routes", "over", "node", "gradient", "é", "漢字", "stage", "1024", "bubble"]


def corpus(folder: Path, texts: int = 30) -> list[str]:
    """Files of each kind, a few lines of them broken; the patterns that match them."""
    draw = random.Random(0)
    documents = [" ".join(draw.choices(WORDS, k=draw.randint(5, 120))) + f" {i}\n" for i in range(3 * texts)]
    for i in range(texts):
        (folder / f"{i:03d}.txt").write_text(documents[i])
    lines = [json.dumps({"text": text}) for text in documents[texts : 2 * texts]]
    for i, broken in zip(range(3, 30, 10), ('{"text": ', '{"no": "text"}', "null"), strict=True):
        lines[i] = broken
    (folder / "web.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.table({"text": [*documents[2 * texts :], None]}), folder / "books.parquet", row_group_size=7)
    return [f"{folder}/*.txt", f"{folder}/*.jsonl", f"{folder}/*.parquet"]


def texts_of(folder: Path, split: SplitName) -> list[str]:
    """The documents of a split, decoded, special tokens spelled out and without the end token."""
    packed = PackedTokens(folder, split)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = packed.document_ends().astype(int)
    assert all(packed.tokens(end - 1, 1) == packed.dataset.end_token for end in ends)
    pieces = [packed.tokens(a, b - a - 1) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return plain.decode_batch([piece.tolist() for piece in pieces], skip_special_tokens=False)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their paths in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
