"""The model under evaluation, and how it is prompted: common to all kinds of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from dryvine.trainer.data.spec import OnProgress
from dryvine.trainer.evaluation.record import Prompt
from dryvine.trainer.generate.dialogue import Dialogue, document, plain, text_of
from dryvine.trainer.generate.lane import Until
from dryvine.trainer.generate.open import WeightSource
from dryvine.trainer.generate.requests import Completion, Request
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.generate.score import Passage, Score
from dryvine.trainer.hand_off.tokenizer_files import TokenizerFiles
from dryvine.trainer.intervals import Figure

TAIL = 8  # tokens behind which a text that ends an answer may begin, beside its own characters


class Asking(NamedTuple):
    """The settings of an evaluation; equal settings give equal answers."""

    chat: bool = False  # texts of prompts are a user's turn
    max_tokens: int = 256
    samples: int = 16
    temperature: float = 1.0
    seed: int = 0
    context: int | None = None  # tokens that a text is read with; None: the model's positions


class EvalQuestion(NamedTuple):
    """A prompt to answer. `until`: texts that end an answer and are not part of it."""

    prompt: Prompt
    until: tuple[str, ...] = ()
    max_tokens: int | None = None


class Findings(NamedTuple):
    """A task's results: figures, and a JSON object for each of its lines. `note`: what to tell the user beside them."""

    figures: dict[str, Figure]
    answers: list[dict[str, object]]
    note: str = ""


@dataclass
class Subject:
    """An opened model."""

    source: WeightSource
    sampler: Sampler
    files: TokenizerFiles
    asking: Asking = field(default_factory=Asking)

    @cached_property
    def dialogue(self) -> Dialogue:
        return self.source.dialogue(self.files)

    @property
    def context(self) -> int:
        """The most tokens that are fed at once."""
        reach = self.source.shape.max_position
        return min(self.asking.context or reach, reach)

    def document(self, text: str) -> tuple[int, ...]:
        return document(self.files.vocabulary, text)

    def prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens of a prompt: text as the beginning of a document, messages by the model's chat template."""
        if isinstance(prompt, str) and not self.asking.chat:
            return self.document(prompt)
        return self.dialogue.prompt([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)

    def choice(self, prompt: Prompt, text: str) -> Passage:
        """A text after a prompt, to be scored. A token with characters of both belongs to the text."""
        before = self.prompt(prompt)
        if not isinstance(prompt, str) or self.asking.chat:
            return Passage((*before, *plain(self.files.vocabulary, text)), len(before))
        both = self.prompt(prompt + text)
        alike = next((i for i, (a, b) in enumerate(zip(before, both, strict=False)) if a != b), len(before))
        return Passage(both, max(1, min(alike, len(both) - 1)))

    def text(self, tokens: Sequence[int]) -> str:
        return text_of(self.files.vocabulary, tokens)

    def score(self, passages: Sequence[Passage], on_progress: OnProgress) -> Iterator[Score]:
        for done, score in enumerate(self.sampler.score(passages), 1):
            on_progress("scoring", done, len(passages))
            yield score

    def answers(
        self, questions: Sequence[EvalQuestion], samples: int, temperature: float, on_progress: OnProgress
    ) -> list[list[Completion]]:
        """`samples` answers to each, in order."""
        found: list[dict[int, Completion]] = [{} for _ in questions]
        requests = self._requests(questions, samples, temperature)
        for done, completion in enumerate(self.sampler.generate(requests, self._until(questions)), 1):
            assert completion.request.group is not None
            found[completion.request.group][completion.request.seed] = completion
            on_progress("answering", done, len(questions) * samples)
        return [[one[seed] for seed in sorted(one)] for one in found]

    def answer_text(self, question: EvalQuestion, completion: Completion) -> str:
        """The answer's text, up to what ends it."""
        tokens = completion.tokens.tolist()
        text = self.text(tokens) if self._is_plain(question.prompt) else self.dialogue.text(tokens)
        return min((text.split(end, 1)[0] for end in question.until), key=len, default=text)

    def _is_plain(self, prompt: Prompt) -> bool:
        return isinstance(prompt, str) and not self.asking.chat

    def _requests(self, questions: Sequence[EvalQuestion], samples: int, temperature: float) -> Iterator[Request]:
        """One request for each answer, each with its own seed."""
        for number, question in enumerate(questions):
            prompt, most = self.prompt(question.prompt), question.max_tokens or self.asking.max_tokens
            end = frozenset({self.files.vocabulary.end})
            stop = end if self._is_plain(question.prompt) else self.dialogue.stop
            # An answer ends where the model's positions do, as in `chat`.
            most = max(1, min(most, self.source.shape.max_position + 1 - len(prompt)))
            for sample in range(samples):
                seed = (self.asking.seed << 40) + number * samples + sample
                yield Request(prompt, most, temperature, 1.0, seed, stop, number)

    def _until(self, questions: Sequence[EvalQuestion]) -> Until:
        def ended(request: Request, tokens: list[int]) -> bool:
            assert request.group is not None
            ends = questions[request.group].until
            return bool(ends) and any(end in self.text(tokens[-len(end) - TAIL :]) for end in ends)

        return ended


def failures(completions: Iterable[Completion]) -> str:
    """Why answers are missing; empty if none is."""
    return "; ".join(sorted({one.why for one in completions if one.reason == "failed"}))
