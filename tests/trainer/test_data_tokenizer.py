"""Given tokenizers of other makers: what a hostile text spells stays text, whatever the tokenizer.json declares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from dryvine.trainer.data import tokenizer
from dryvine.trainer.data.build import build
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.encoding import TextPart
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.packed_tokens import PackedTokens
from dryvine.trainer.data.readers import text as text_reader
from dryvine.trainer.data.spec import BuildSpec

END = "<｜end▁of▁sentence｜>"
FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
ROLES = ("<|User|>", "<|Assistant|>", "<think>", "[INST]")


def save(path: Path, made: Tokenizer) -> Path:
    made.save(str(path))
    return path


def given(path: Path, special: tuple[str, ...] = ()) -> Path:
    """As DeepSeek-Coder's: end, fill-in-the-middle and roles are added tokens, `special` only where named."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name in (END, *FIM, *ROLES, "ü", "    ", "catfish"):
        made.add_tokens([AddedToken(name, special=name in special, normalized=name in ROLES)])
    return save(path, made)


def hostile(folder: Path) -> None:
    texts = [f"document {i}" for i in range(50)] + ["a".join((END, *FIM, *ROLES))] * 3
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))


@pytest.mark.parametrize("special", [(), (END,), FIM], ids=["none", "end", "fim"])
def test_added_tokens_are_not_injected_special_or_not(tmp_path: Path, special: tuple[str, ...]) -> None:
    hostile(tmp_path)
    path = given(tmp_path / "given.json", special)
    spec = BuildSpec(tokenizer=path, validation_fraction=0)
    dataset = build(match_files([f"{tmp_path}/*.jsonl"]), spec, tmp_path / "out")
    tokens = PackedTokens(tmp_path / "out", "train").tokens(0, dataset.train.tokens).tolist()
    ids = Tokenizer.from_file(str(path)).get_vocab()
    assert {name: tokens.count(ids[name]) for name in (*FIM, *ROLES)} == dict.fromkeys((*FIM, *ROLES), 0)
    assert tokens.count(ids[END]) == 53
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == path.read_bytes()


MAKERS = {
    "Llama 3": ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|reserved_special_token_0|>"),
    "ChatML": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"),
    "StarCoder": ("<|endoftext|>", "<fim_prefix>", "<fim_suffix>", "<filename>"),
    "Mistral": ("</s>", "<s>", "[TOOL_CALLS]", "[/INST]"),
    "Gemma": ("<eos>", "<bos>", "<start_of_turn>", "<unused99>"),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_the_control_tokens_of_other_makers_are_text_too(tmp_path: Path, maker: str, suffix: str) -> None:
    """In one file and in records; beside each other, between letters and behind blanks, which a token may strip."""
    names = MAKERS[maker]
    made = Tokenizer.from_file(str(given(tmp_path / "given.json")))
    made.add_tokens([AddedToken(name, special=False, lstrip=True, rstrip=True) for name in names])
    path = save(tmp_path / "t.json", made)
    text = "".join(names) + "".join(f"a {name} b" for name in names)
    (tmp_path / f"in{suffix}").write_text(text if suffix == ".txt" else json.dumps({"text": text}))
    dataset = build(
        match_files([f"{tmp_path}/in{suffix}"]), BuildSpec(tokenizer=path, validation_fraction=0), tmp_path / "out"
    )
    tokens = PackedTokens(tmp_path / "out", "train").tokens(0, dataset.train.tokens).tolist()
    # DeepSeek's end token is in this vocabulary, too: the first known one ends documents.
    assert {name: tokens.count(made.token_to_id(name)) for name in names if name != "<|endoftext|>"} == {
        name: 0 for name in names if name != "<|endoftext|>"
    }
    assert tokens.count(dataset.end_token) == 1
    assert len(tokens) == 1 + len(text.encode())


def test_added_tokens_that_are_words_or_blanks_are_text(tmp_path: Path) -> None:
    path = given(tmp_path / "given.json")
    vocabulary, plain = tokenizer.load(path), Tokenizer.from_file(str(path))
    ids = plain.get_vocab()
    text = "a catfish,    ü"
    encoded = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    assert {ids["catfish"], ids["    "], ids["ü"]} <= set(encoded)
    assert encoded == plain.encode(text, add_special_tokens=False).ids
    assert vocabulary.tokenizer.get_vocab() == ids
    assert (vocabulary.end, vocabulary.fim) == (ids[END], tuple(ids[name] for name in FIM))


def test_a_control_token_with_blanks_around_it_is_a_control_token(tmp_path: Path) -> None:
    made = Tokenizer.from_file(str(given(tmp_path / "given.json")))
    made.add_tokens([AddedToken("\n<|Tool|> ", special=False)])
    vocabulary = tokenizer.load(save(tmp_path / "t.json", made))
    ids = vocabulary.tokenizer.encode("a\n<|Tool|> b", add_special_tokens=False).ids
    assert len(ids) == len("a\n<|Tool|> b")


def test_a_spelling_that_only_the_normalizer_makes_is_text_too(tmp_path: Path) -> None:
    made = Tokenizer.from_file(str(given(tmp_path / "given.json")))
    made.normalizer = normalizers.NFKC()
    vocabulary = tokenizer.load(save(tmp_path / "nfkc.json", made))
    ids = vocabulary.tokenizer.encode("a＜|User|＞b［INST］", add_special_tokens=False).ids
    assert not {made.token_to_id(name) for name in ROLES} & set(ids)


def unigram() -> Tokenizer:
    """Its model has the end token as a piece and finds it in text, special or not."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "abcs</>")]
    made = Tokenizer(models.Unigram(pieces, 0, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made


def word_level() -> Tokenizer:
    made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def whole_words() -> Tokenizer:
    made = Tokenizer(models.BPE({"a": 0, "</s>": 1, "<": 2, "/": 3, "s": 4, ">": 5}, [], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


@pytest.mark.parametrize("make", [unigram, word_level, whole_words])
def test_a_model_that_finds_its_end_token_in_text_is_refused(tmp_path: Path, make: Callable[[], Tokenizer]) -> None:
    made = make()
    made.add_special_tokens(["</s>"])
    with pytest.raises(DataError, match=r"t\.json: text that spells </s> becomes that token; .*byte-level BPE"):
        tokenizer.load(save(tmp_path / "t.json", made))


def test_a_model_with_an_unknown_token_is_not_refused_for_it(tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<unk>", "</s>"])
    assert tokenizer.load(save(tmp_path / "t.json", made)).end == 2


def letters(normalizer: normalizers.Normalizer | None, pre: pre_tokenizers.PreTokenizer | None) -> Tokenizer:
    """A tokenizer of single characters (bytes where it has none) and one merge, with an end token and ours for FIM."""
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet(), *"abcdefghijklmnopqrstuvwxyz \n▁.", "ab"})
    alphabet += [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {letter: number for number, letter in enumerate(alphabet)}
    made = Tokenizer(models.BPE(vocab, [("a", "b")], byte_fallback=True))
    if normalizer:
        made.normalizer = normalizer
    if pre:
        made.pre_tokenizer = pre
    made.add_special_tokens(["</s>", *tokenizer.FIM])
    return made


def trimming(post: processors.PostProcessor) -> Tokenizer:
    """GPT-2's with a space in front, whose post-processor leaves blanks out of the tokens' places."""
    made = letters(None, pre_tokenizers.ByteLevel(add_prefix_space=True))
    made.post_processor = post
    return made


# Each adds something to, or takes something off, the start or the end of whatever it is given.
AT_THE_ENDS = {
    "prepend": letters(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
    "metaspace first": letters(None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace always": letters(None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "byte level with a space": letters(None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "byte level that trims places": trimming(processors.ByteLevel(trim_offsets=True)),
    "as RoBERTa": trimming(processors.RobertaProcessing(("</s>", 0), ("</s>", 0), trim_offsets=True)),
    "strip": letters(normalizers.Strip(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "strip and prepend": letters(normalizers.Sequence([normalizers.Strip(), normalizers.Prepend("▁")]), None),
}
IN_PLACE = {
    "byte level": letters(None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "metaspace never": letters(None, pre_tokenizers.Metaspace(prepend_scheme="never")),
    "nfc": letters(normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "nothing": letters(None, None),
}
LONG = "abc def\nabba  é漢\nghi\n\nxyz \n" * 30


def packed(folder: Path, path: Path, **options: float) -> list[int]:
    spec = BuildSpec(tokenizer=path, validation_fraction=0, **options)
    dataset = build(match_files([f"{folder}/*.txt"]), spec, folder / "out")
    return PackedTokens(folder / "out", "train").tokens(0, dataset.train.tokens).tolist()


@pytest.mark.parametrize("kind", [*AT_THE_ENDS, *IN_PLACE])
@pytest.mark.parametrize("text", [LONG, "no line ends here " * 60], ids=["lines", "one line"])
def test_a_text_read_in_pieces_has_the_tokens_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, text: str
) -> None:
    made = (AT_THE_ENDS | IN_PLACE)[kind]
    path = save(tmp_path / "t.json", made)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("another")
    monkeypatch.setattr(text_reader, "PIECE_BYTES", 50)
    end, ids = [made.token_to_id("</s>")], [made.encode(t, add_special_tokens=False).ids for t in (text, "another")]
    assert packed(tmp_path, path) == ids[0] + end + ids[1] + end


@pytest.mark.parametrize("kind", [*AT_THE_ENDS, *IN_PLACE])
def test_fill_in_the_middle_adds_nothing_at_the_cuts(tmp_path: Path, kind: str) -> None:
    made = (AT_THE_ENDS | IN_PLACE)[kind]
    path, texts = save(tmp_path / "t.json", made), [f"words of document\n number {i}" for i in map(str, range(60))]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02d}.txt").write_text(text)
    tokens = packed(tmp_path, path, fim_rate=1.0)
    end, begin, hole, middle = (made.token_to_id(name) for name in ("</s>", *tokenizer.FIM))
    for text in texts:
        document, tokens = tokens[: tokens.index(end)], tokens[tokens.index(end) + 1 :]
        at = [document.index(marker) for marker in (begin, hole, middle)]
        parts = document[1 : at[1]], document[at[1] + 1 : at[2]], document[at[2] + 1 :]
        assert at[0] == 0
        joined = parts[0] + parts[2] + parts[1]
        whole = made.encode(text, add_special_tokens=False).ids
        assert "".join(map(made.id_to_token, joined)) == "".join(map(made.id_to_token, whole))
    assert not tokens


@pytest.mark.parametrize("kind", AT_THE_ENDS)
def test_records_that_are_whole_are_encoded_as_ever(tmp_path: Path, kind: str) -> None:
    vocabulary = tokenizer.load(save(tmp_path / "t.json", AT_THE_ENDS[kind]))
    assert not vocabulary.encoder.in_place
    expected = AT_THE_ENDS[kind].encode(" some text \n", add_special_tokens=False).ids
    assert vocabulary.encode([TextPart(None, " some text \n")]) == [expected]


@pytest.mark.parametrize("kind", IN_PLACE)
def test_what_edits_in_place_needs_no_care(tmp_path: Path, kind: str) -> None:
    assert tokenizer.load(save(tmp_path / "t.json", IN_PLACE[kind])).encoder.in_place


def test_unknown_characters_beside_a_cut_are_kept(tmp_path: Path) -> None:
    """A model may fuse neighbouring unknown characters into one token, also with what is put beside the text."""
    made = Tokenizer(models.BPE({"<unk>": 0, "a": 1, "▁": 2}, [], unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Prepend("▁")
    made.add_special_tokens(["</s>"])
    vocabulary = tokenizer.load(save(tmp_path / "t.json", made))
    assert vocabulary.encode([TextPart(None, "?a?", starts=False, ends=False)]) == [[0, 1, 0]]
    assert vocabulary.encode([TextPart(None, "", starts=False, ends=False)]) == [[]]


def test_a_letter_that_is_declared_special_is_still_a_letter(tmp_path: Path) -> None:
    """As where "!" pads: with an ordinary token of the vocabulary, which text has to be able to contain."""
    made = Tokenizer.from_file(str(given(tmp_path / "given.json")))
    made.add_special_tokens(["!"])
    vocabulary = tokenizer.load(save(tmp_path / "t.json", made))
    assert vocabulary.encode([TextPart(None, "!")]) == [[made.token_to_id("!")]]


@pytest.mark.parametrize("name", ["<|endoftext|>", "<｜end▁of▁sentence｜>", "<|end_of_text|>", "</s>", "<eos>"])
def test_known_end_tokens_and_ids_with_gaps(tmp_path: Path, name: str) -> None:
    """The size is what an embedding needs: one more than the largest id, also where ids are left out."""
    made = Tokenizer(models.BPE({"a": 0, "b": 70}, []))
    made.add_special_tokens([name])
    vocabulary = tokenizer.load(save(tmp_path / "t.json", made))
    assert vocabulary.end == made.token_to_id(name)
    assert vocabulary.size == max(made.get_vocab().values()) + 1 > len(made.get_vocab())
    assert vocabulary.sha256 == hashlib.sha256((tmp_path / "t.json").read_bytes()).hexdigest()


def test_neither_padding_nor_truncation_of_a_given_tokenizer_is_used(tmp_path: Path) -> None:
    made = letters(None, None)
    made.enable_padding(length=20)
    made.enable_truncation(3)
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("defghi")
    end = [made.token_to_id("</s>")]
    ids = [[made.token_to_id(letter) for letter in word] for word in (("ab", "c"), "defghi")]
    assert packed(tmp_path, save(tmp_path / "t.json", made)) == ids[0] + end + ids[1] + end


def test_what_is_cut_into_pieces_is_not_put_fill_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_reader, "PIECE_BYTES", 50)
    made = letters(None, None)
    (tmp_path / "a.txt").write_text("a line of text\n" * 20)
    (tmp_path / "b.txt").write_text("short\n")
    tokens = packed(tmp_path, save(tmp_path / "t.json", made), fim_rate=1.0)
    assert [tokens.count(made.token_to_id(name)) for name in tokenizer.FIM] == [1, 1, 1]
