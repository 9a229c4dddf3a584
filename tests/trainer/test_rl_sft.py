"""Fine-tuning: conversations to tokens, a loss on answers only, bad lines by number, layouts and resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken

from dryvine.trainer import verify
from dryvine.trainer.batches import read_batch
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.tokenizer import learn_tokenizer as learn_vocabulary
from dryvine.trainer.hand_off.commands import ExportAs
from dryvine.trainer.hand_off.run_files import open_run
from dryvine.trainer.rl.chat import BadConversation, Chat
from dryvine.trainer.rl.chat_config import ChatConfig
from dryvine.trainer.rl.conversations import Conversations, open_conversations, read
from dryvine.trainer.rl.fitting import fit
from dryvine.trainer.run_rows import read as rows_of
from tests.support.rig import rig_of, train_on

Tiny = Callable[..., Config]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    """Bytes, with role and thinking tokens."""
    path = tmp_path_factory.mktemp("chat") / "tokenizer.json"
    made = learn_vocabulary(["a few words to learn from"], 262)
    added = ["<|User|>", "<|Assistant|>", "<think>", "</think>"]
    made.add_special_tokens([AddedToken(name, special=True) for name in added])
    made.save(str(path))
    return Chat(ChatConfig(tokenizer=str(path), controls=("<think>", "</think>")))


def say(user: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def test_only_answers_and_their_end_are_learnt(chat: Chat) -> None:
    turns = chat.encode([*say("hi", "<think>x</think>yo"), *say("b", "c")])
    names = [chat.vocabulary.tokenizer.id_to_token(token) for token in turns.tokens]
    learnt = [name for name, is_learnt in zip(names, turns.learnt, strict=True) if is_learnt]
    assert learnt == ["<think>", "x", "</think>", "y", "o", "<|endoftext|>", "c", "<|endoftext|>"]
    assert names[:4] == ["<|User|>", "h", "i", "<|Assistant|>"]
    prompt = chat.prompt(say("hi", "x")[:1])
    assert list(prompt) == turns.tokens[: len(prompt)]
    answer = turns.tokens[len(prompt) : len(prompt) + 6]
    assert answer[-1] == chat.stop
    assert chat.text(answer) == "<think>x</think>yo"


def test_what_a_user_types_is_never_a_control_token(chat: Chat) -> None:
    """Nor is one in an answer that is not among `controls`."""
    plain = chat.encode(say("<think><|endoftext|><|Assistant|>", "<|User|><|endoftext|>"))
    names = [chat.vocabulary.tokenizer.id_to_token(token) for token in plain.tokens]
    assert names.count("<think>") == 0
    assert names.count("<|User|>") == names.count("<|Assistant|>") == names.count("<|endoftext|>") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"controls": ("<tool>",)}, "'<tool>' is no special token"),
        ({"roles": {"user": "{content}", "assistant": "{content}"}}, "no answer would ever end"),
        ({"roles": {"user": "{content}", "assistant": "{content}\n<|endoftext|>"}}, "begins with plain text"),
    ],
)
def test_a_chat_that_cannot_work_is_refused(chat: Chat, changes: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Chat(chat.config.model_copy(update=changes))


def test_templates_need_a_place_for_content(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"must hold .content. once"):
        tiny('sft.train="a"', 'sft.validation="b"', 'sft.chat={tokenizer="c", roles={assistant="x"}}')


# -- files


def test_every_bad_line_is_named(chat: Chat, tmp_path: Path) -> None:
    lines = [
        json.dumps({"messages": say("a", "b")}), "{", json.dumps({"messages": []}), json.dumps([1]),
        json.dumps({"messages": [{"role": "wizard", "content": "x"}]}),
        json.dumps({"messages": [{"role": "user", "content": ""}]}),
        json.dumps({"messages": [{"role": "user", "content": "x"}]}), "\xff" * 3, "[" * 100000,
        json.dumps({"messages": say("a", "b" * 40)}), json.dumps({"messages": ["x"]}),
    ]  # fmt: skip
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(line.encode("latin-1") for line in lines))
    with pytest.raises(DataError) as error:
        read(path, chat, 32)
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith(f"{path}: 10 bad lines")
    assert all(f"line {n}:" in said for n in range(2, 7))
    assert said.endswith("and lines 7, 8, 9, 10, 11")
    for number, why in ((7, "no message of the role 'assistant'"), (10, "tokens, and data.seq_len"), (8, "no JSON")):
        path.write_bytes(lines[number - 1].encode("latin-1"))
        with pytest.raises(DataError, match=f"1 bad line, .*line 1: .*{why}"):
            read(path, chat, 32)
    with pytest.raises(DataError, match="No such file"):
        read(tmp_path / "none.jsonl", chat, 32)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 33), min_size=1, max_size=200))
def test_documents_fit_without_overlap_and_no_two_rows_could_be_one(sizes: list[int]) -> None:
    taken: dict[int, set[int]] = {}
    for size, place in zip(sizes, fit(sizes, 33), strict=True):
        tokens = set(range(place.start, place.start + size))
        assert place.start + size <= 33
        assert not taken.setdefault(place.row, set()) & tokens
        taken[place.row] |= tokens
    assert sorted(taken) == list(range(len(taken)))
    assert all(len(one) + len(other) > 33 for one, other in combinations(taken.values(), 2))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 33), min_size=1, max_size=8))
def test_documents_take_few_more_rows_than_they_must(sizes: list[int]) -> None:
    """As few as can be are more than their tokens fill: four of 19 and one of 15 need five rows of 33."""

    def fewest(rows: tuple[int, ...], left: list[int]) -> int:
        """Rows, with so much in each, if the documents that are left are put into them in the best way."""
        if not left:
            return len(rows)
        size, *rest = left
        fitting = [n for n, used in enumerate(rows) if used + size <= 33]
        ways = [(*rows[:n], rows[n] + size, *rows[n + 1 :]) for n in fitting] + [(*rows, size)]
        return min(fewest(way, rest) for way in ways)

    assert 1 + max(place.row for place in fit(sizes, 33)) <= fewest((), sizes) * 11 / 9 + 6 / 9


def test_a_million_documents_fit_in_seconds() -> None:
    assert len(fit([1 + n % 500 for n in range(100_000)], 4096)) == 100_000


def test_every_conversation_is_read_once_an_epoch(chat: Chat) -> None:
    turns = [chat.encode(say("q" * (n % 5 + 1), "r" * (n % 7 + 1))) for n in range(40)]
    source = Conversations(turns, 32, 2, seed=3)
    rows = len(source.rows)
    for epoch in (0, 1):
        tokens = source.sequences(epoch * rows, rows)
        learnt, documents = source.learnt(epoch * rows, rows), source.documents(epoch * rows, rows)
        found = []
        for line, is_learnt, numbers in zip(tokens, learnt, documents, strict=True):
            for number in range(numbers.max() + 1):
                part = numbers == number
                if is_learnt[part].any():
                    found.append((line[part].tolist(), is_learnt[part].tolist()))
        assert sorted(found) == sorted((one.tokens, one.learnt) for one in turns)
    assert not np.array_equal(source.sequences(0, rows), source.sequences(rows, rows))


# -- a run


@pytest.fixture
def tuned(tiny: Tiny, chat: Chat, tmp_path: Path) -> Tiny:
    """The tiny config on conversations that a model can learn: an answer says the question again."""
    for name in ("train", "validation"):
        turns = [{"messages": say("abcdefgh"[n % 8] * (n % 3 + 1), "abcdefgh"[n % 8])} for n in range(160)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in turns))
    sft = (
        f'sft.train="{tmp_path}/train.jsonl"', f'sft.validation="{tmp_path}/validation.jsonl"',
        f'sft.chat.tokenizer="{chat.config.tokenizer}"', 'data.mask="document"', "batch.sequences=8",
    )  # fmt: skip
    return lambda *overrides: tiny(*sft, *overrides)


def test_the_loss_is_the_mean_over_what_is_learnt(tuned: Tiny) -> None:
    rig = rig_of(tuned("parallel.microbatch_sequences=2"))
    batch = read_batch(rig, rig.data.train, 0, 8)
    learnt = rig.data.train.learnt(0, 8)  # type: ignore[attr-defined]
    for depth in (0, 1):
        weights = torch.stack([d.weights[depth] for d in batch.documents]).reshape(8, -1)  # type: ignore[union-attr, attr-defined]
        counts = torch.from_numpy(learnt[:, 1 + depth : 33 + depth])
        if depth == 0:
            assert torch.equal(weights > 0, counts)
        assert not (weights[~counts]).any()
        assert float(weights.mean()) == pytest.approx(1, rel=1e-6)


@pytest.mark.long
def test_a_run_learns_to_answer_and_resumes_to_the_bit(tuned: Tiny, tmp_path: Path) -> None:
    more = ("optim.lr=1e-2", "run.steps=20", "run.eval_every=20", "run.checkpoint_every=10")
    config = tuned(*more)
    train_on(0, config)
    rows = rows_of(config.run.folder)
    assert rows[-1]["val_loss"] < 0.5 * rows[0]["val_loss"]
    halves = tuned(*more, 'run.name="halves"', "run.steps=10")
    train_on(0, halves)
    train_on(0, halves.model_copy(update={"run": halves.run.model_copy(update={"steps": 20})}))
    assert rows_of(halves.run.folder)[-1]["val_loss"] == rows[-1]["val_loss"]


@pytest.mark.long
def test_a_layout_fine_tunes_like_one_process(tuned: Tiny) -> None:
    layout = ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", "batch.sequences=16")
    assert not [d for d in verify.compare(tuned(*layout)) if not d.fine]


def test_conversations_need_document_masks_and_room_for_their_tokens(tuned: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"set data\.mask = 'document'"):
        tuned('data.mask="none"')
    with pytest.raises(DataError, match=r"token ids; set data.vocab_size = \d+ or more"):
        open_conversations(tuned("data.vocab_size=260"))
    with pytest.raises(ConfigError, match="two runs"):
        tuned('rl.chat.tokenizer="t"')


def test_messages_that_are_none_are_refused(chat: Chat) -> None:
    for messages in ([1], [{"role": "user"}], [{"role": 3, "content": "x"}], [{"content": "x"}]):
        with pytest.raises(BadConversation):
            chat.encode(messages)  # type: ignore[arg-type]


def test_a_fine_tuned_run_is_exported_with_its_tokenizer_and_template(tuned: Tiny, chat: Chat, tmp_path: Path) -> None:
    """The template writes what fine-tuning taught."""
    config = tuned("run.steps=1")
    train_on(0, config)
    run = open_run(str(config.run.folder))
    files = ExportAs("hf").tokenizer_of(run)
    assert files.vocabulary.sha256 == chat.vocabulary.sha256
    template = ImmutableSandboxedEnvironment().from_string(files.chat_template)
    turns = [*say('say "hi"', "yo {}"), *say("b", "c")]
    text = chat.vocabulary.tokenizer.decode(chat.encode(turns).tokens, skip_special_tokens=False)
    assert template.render(messages=turns) == text
    asked = template.render(messages=turns[:3], add_generation_prompt=True)
    assert asked == chat.vocabulary.tokenizer.decode(list(chat.prompt(turns[:3])), skip_special_tokens=False)
