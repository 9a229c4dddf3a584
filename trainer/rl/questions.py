"""Which questions a run asks, and the requests they become: pure functions of the run's seed and of how many were asked
before.

Every epoch has its own order of questions, and the seed of answer j to question n depends on (seed, n, j) alone. So the
only sampling state of a run is a count, and a rollout that is repeated after a kill samples the same tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.data.order import SequenceOrder
from dryvine.trainer.generate.requests import Request
from dryvine.trainer.rl.chat import BadConversation, Chat
from dryvine.trainer.rl.config import RLConfig
from dryvine.trainer.rl.tasks.names import questions
from dryvine.trainer.rl.tasks.question import Question, SplitOfTask, TaskError
from dryvine.trainer.rl.verifiers.pool import Pool, VerifierError
from dryvine.trainer.rl.verifiers.stops import stops_of


@dataclass(frozen=True)
class SamplingOptions:
    """How a question is sampled: `samples` answers, at a temperature."""

    samples: int
    temperature: float


@dataclass(frozen=True)
class RLTask:
    """The questions of a run and its chat. Built before any process group exists."""

    rl: RLConfig
    chat: Chat
    train: Sequence[Question]
    held_out: Sequence[Question]
    seed: int

    def question(self, number: int) -> Question:
        """Question `number` of the run, from 0."""
        return self.train[SequenceOrder(self.seed, len(self.train)).window(number)]

    def requests(
        self, question: Question, number: int, ask: SamplingOptions, purpose: str = "train"
    ) -> Iterator[Request]:
        """One request for each answer; they form a group, so their prompt is computed once."""
        prompt = self.chat.prompt(question.messages)
        for sample in range(ask.samples):
            key = f"{purpose} {self.seed} {number} {sample}".encode()
            seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
            stop = frozenset((self.chat.stop,))
            yield Request(prompt, self.rl.max_tokens, ask.temperature, 1.0, seed, stop, number)

    @property
    def verifiers(self) -> set[str]:
        """The names of all verifiers that the questions need."""
        return {name for question in (*self.train, *self.held_out) for name in question.weights}


def open_task(config: Config) -> RLTask:
    """Raises ConfigError, DataError."""
    rl = config.rl
    assert rl is not None
    chat = Chat(rl.chat)
    if chat.vocabulary.size > config.model.vocab:
        raise ConfigError(
            f"model.vocab = {config.model.vocab}: {rl.chat.tokenizer} has {chat.vocabulary.size} token ids; "
            "name the tokenizer that the model was trained with"
        )
    try:
        train, held_out = _checked(rl.task, "train", chat), _checked(rl.task, "validation", chat)[: rl.eval_problems]
    except TaskError as error:
        raise ConfigError(str(error)) from None
    room = config.data.seq_len + 1 - rl.max_tokens
    # Encoding all would take minutes where there are many: those of fewer bytes than tokens would fit are not.
    maybe = [question.messages for question in (*train, *held_out) if chat.prompt_bytes(question.messages) > room]
    if (longest := max((len(chat.prompt(messages)) for messages in maybe), default=0)) > room:
        raise ConfigError(
            f"rl.max_tokens = {rl.max_tokens}, behind a prompt of {longest} tokens, is more than data.seq_len + 1 = "
            f"{config.data.seq_len + 1}; lower it, or raise data.seq_len"
        )
    if rl.harvest is not None:
        _check_writable(Path(rl.harvest))
    return RLTask(rl, chat, train, held_out, config.run.seed)


def _checked(task: Mapping[str, object], split: SplitOfTask, chat: Chat) -> Sequence[Question]:
    """The questions of a split, all of which the chat can encode. Raises TaskError."""
    found = questions(task, split)
    for number, question in enumerate(found, 1):
        try:
            chat.check(question.messages)
        except BadConversation as error:
            raise TaskError(f"rl.task, question {number} of the {split} split: {error}; see rl.chat.roles") from None
    return found


def _check_writable(path: Path) -> None:
    """Raise ConfigError if rl.harvest cannot be written; nothing is made yet."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"rl.harvest = {str(path)!r} cannot be written: name a file in a folder of yours")


def check_verifiers(task: RLTask) -> None:
    """Load every verifier once, before any GPU is held. Raises ConfigError for one that cannot be loaded."""
    try:
        stops_of(task.verifiers)
        Pool(task.verifiers, workers=1).close()
    except VerifierError as error:
        raise ConfigError(f"rl.task: {error}") from None
