"""Given tokenizers of other makers: what a hostile text spells stays text, whatever the tokenizer.json declares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from dryvine.trainer.data import tokenizer
from dryvine.trainer.data.build import build
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.packed_tokens import PackedTokens
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
