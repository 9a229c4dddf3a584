"""Fifty-odd files as crawls, exports and broken copies leave them, each with what a build is to make of it."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

UTF16 = "UTF-16, not UTF-8; convert it with iconv -f UTF-16 -t UTF-8"
UTF32 = "UTF-32, not UTF-8; convert it with iconv -f UTF-32 -t UTF-8"
NULS = "NUL bytes: UTF-16 without its mark, or not text"
NUL_LINE = "NUL bytes, which no text has"
NUL_RECORD = "NUL characters: UTF-16 read as bytes"
POEM = "A line,\nand one with é and 漢字.\n"
LONG = "x" * (2**20 + 5)


class Hostile(NamedTuple):
    """A file; the documents that it holds all the same; and its quarantined lines, with how their reasons begin."""

    name: str
    content: bytes
    documents: tuple[str, ...] = ()
    broken: tuple[tuple[int, str], ...] = ()


def _lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def _parquet(**columns: pa.Array) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def _stream(*texts: str) -> bytes:
    table, out = pa.table({"text": list(texts)}), io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return out.getvalue()


def _zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)  # type: ignore[no-any-return]


def _strings(*texts: str | None) -> pa.Array:
    return pa.array(texts, pa.string())


TEXTS = (
    Hostile("utf16.txt", POEM.encode("utf-16"), (), ((1, UTF16),)),
    Hostile("utf16-be.txt", b"\xfe\xff" + POEM.encode("utf-16-be"), (), ((1, UTF16),)),
    Hostile("utf32.txt", POEM.encode("utf-32"), (), ((1, UTF32),)),
    Hostile("utf16-unmarked.txt", POEM.encode("utf-16-le"), (), ((1, NULS),)),
    Hostile("archive.txt", gzip.compress(POEM.encode(), mtime=0), (), ((1, NULS),)),
    Hostile("picture.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", (), ((1, NULS),)),
    Hostile("nul-far-in.txt", b"much\n" * 2000 + b"a\0b\nend\n", ("much\n" * 2000 + "end\n",), ((2001, NUL_LINE),)),
    Hostile("latin1.txt", b"one\ncaf\xe9\nthree\n", ("one\nthree\n",), ((2, "not UTF-8"),)),
    Hostile("cp1252.txt", b"\x93quoted\x94\n\x80 5\n", (), ((1, "not UTF-8"), (2, "not UTF-8"))),
    Hostile("half-a-character.txt", b"one\ntwo\n\xe2\x82", ("one\ntwo\n",), ((3, "not UTF-8"),)),
    Hostile("overlong.txt", b"a\n\xc0\xaf\n", ("a\n",), ((2, "not UTF-8"),)),
    Hostile("surrogates.txt", b"b\n\xed\xa0\x80\n", ("b\n",), ((2, "not UTF-8"),)),
    Hostile("beyond-unicode.txt", b"c\n\xf4\x90\x80\x80\n", ("c\n",), ((2, "not UTF-8"),)),
    Hostile("mark.txt", b"\xef\xbb\xbfd\n", ("d\n",)),
    Hostile("mark-only.txt", b"\xef\xbb\xbf"),
    Hostile("empty.txt", b""),
    Hostile("blank.txt", b"\n\n \n", ("\n\n \n",)),
    Hostile("old-mac.txt", b"e\rf\r", ("e\rf\r",)),
    Hostile("dos.txt", b"g\r\n\xff\r\nh\r\n", ("g\r\nh\r\n",), ((2, "not UTF-8"),)),
    Hostile("special-tokens.txt", b"<|endoftext|><|fim_hole|></s>", ("<|endoftext|><|fim_hole|></s>",)),
    Hostile("noncharacters.txt", "\U0010ffff\ufffe\u202e!".encode(), ("\U0010ffff\ufffe\u202e!",)),
    Hostile("long-line.txt", LONG.encode(), (LONG,)),
    Hostile("bad-long-line.txt", b"i\n" + LONG.encode() + b"\xff\nj\n", ("i\nj\n",), ((2, "not UTF-8"),)),
    Hostile(os.fsdecode(b"name-\xff.txt"), b"k\n\xff\n", ("k\n",), ((2, "not UTF-8"),)),
    Hostile("new\nline.txt", b"l\n\xff\n", ("l\n",), ((2, "not UTF-8"),)),
)

JSON_LINES = (
    Hostile("cut-off.jsonl", _lines("m") + b'{"text": "n', ("m",), ((2, "not JSON: Unterminated string"),)),
    Hostile("array.jsonl", b'[{"text": "o"}]', (), ((1, "a JSON list, not an object"),)),
    Hostile(
        "pretty.jsonl",
        b'{\n "text": "p"\n}\n',
        (),
        ((1, "not JSON: Expecting"), (2, "not JSON: Extra data"), (3, "not JSON: Expecting value")),
    ),
    Hostile(
        "values.jsonl",
        b'{"text": null}\n{"text": 1}\n{"text": NaN}\n{"text": ["q"]}\n{"text": ""}\n{"Text": "q"}\n"q"\n',
        (),
        (
            (1, "'text' is null"),
            (2, "'text' is int, not a string"),
            (3, "'text' is float, not a string"),
            (4, "'text' is list, not a string"),
            (5, "'text' is empty"),
            (6, "no field 'text'"),
            (7, "a JSON str, not an object"),
        ),
    ),
    Hostile("deep.jsonl", b'{"text": "r", "x": ' + b"[" * 10**5, (), ((1, "maximum recursion depth"),)),
    Hostile("half-a-pair.jsonl", b'{"text": "\\ud83d"}', (), ((1, "half of a surrogate pair, which is no text"),)),
    Hostile("a-pair.jsonl", b'{"text": "\\ud83d\\ude00"}', ("😀",)),
    Hostile("twice.jsonl", b'{"text": "s", "text": "t"}', ("t",)),
    Hostile("huge-number.jsonl", b'{"text": "u", "n": ' + b"9" * 5000 + b"}", (), ((1, "Exceeds the limit"),)),
    Hostile("infinite.jsonl", b'{"text": "v", "n": 1e999, "m": -Infinity}', ("v",)),
    Hostile("marks.jsonl", b"\xef\xbb\xbf" + _lines("w") + b"\xef\xbb\xbf" + _lines("x"), ("w",), ((2, "not JSON"),)),
    Hostile("utf16.jsonl", _lines("y").decode().encode("utf-16"), (), ((1, UTF16),)),
    Hostile("bad-byte.jsonl", _lines("z") + b'{"text": "\xff"}\n' + _lines("A"), ("z", "A"), ((2, "not UTF-8"),)),
    Hostile("blank-lines.jsonl", b"\n \n" + _lines("B") + b"\r\n" + _lines("C"), ("B", "C")),
    Hostile("raw-tab.jsonl", b'{"text": "D\tE"}\n', (), ((1, "not JSON: Invalid control character"),)),
    Hostile("python.jsonl", b"{'text': 'F'}\n", (), ((1, "not JSON: Expecting property name"),)),
    Hostile("trailing-comma.jsonl", b'{"text": "G",}\n', (), ((1, "not JSON"),)),
    Hostile("two-in-a-line.jsonl", b'{"text": "H"} {"text": "I"}\n', (), ((1, "not JSON: Extra data"),)),
    Hostile("nuls.jsonl", _lines("J\0K\0L\0", "a stray \0 one"), ("a stray \0 one",), ((1, NUL_RECORD),)),
)

ARCHIVES = (
    Hostile("two-members.jsonl.gz", gzip.compress(_lines("M")) + gzip.compress(_lines("N")), ("M", "N")),
    Hostile("not-gzip.jsonl.gz", _lines("O"), (), ((1, "damaged from here on"),)),
    Hostile("empty.jsonl.gz", b""),
    Hostile("two-frames.jsonl.zst", _zstd(_lines("P")) + _zstd(_lines("Q")), ("P", "Q")),
    Hostile("noise-behind.jsonl.zst", _zstd(_lines("R")) + b"noise behind", ("R",), ((2, "damaged from here on"),)),
)

TABLES = (
    Hostile("noise.parquet", b"PAR1, but no more than that", (), ((1, ""),)),
    Hostile("empty.parquet", b"", (), ((1, ""),)),
    Hostile("half.parquet", _parquet(text=_strings("S"))[:-20], (), ((1, ""),)),
    Hostile("no-column.parquet", _parquet(body=_strings("T")), (), ((1, "no column 'text'; it has body"),)),
    Hostile("numbers.parquet", _parquet(text=pa.array([1])), (), ((1, "'text' is int, not a string"),)),
    Hostile("no-rows.parquet", _parquet(text=_strings())),
    Hostile("nulls.parquet", _parquet(text=_strings(None, "U", "")), ("U",), ((1, "'text' is null"), (3, "'text' is"))),
    Hostile("bytes.parquet", _parquet(text=pa.array([b"\xff", b"V"]).view(pa.string())), ("V",), ((1, "not UTF-8"),)),
    Hostile("noise.arrow", b"ARROW1 and nothing else", (), ((1, ""),)),
    Hostile("half.arrow", _stream("W", "X")[:-60], ("W",), ((2, ""),)),
)

ALL = (*TEXTS, *JSON_LINES, *ARCHIVES, *TABLES)


def write(folder: Path) -> None:
    for file in ALL:
        (folder / file.name).write_bytes(file.content)
