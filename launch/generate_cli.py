"""`dryvine generate` and `dryvine chat`: sample from a trained, exported or released model."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console

from dryvine.launch.open_model import (
    Device,
    Dtype,
    ExpertMemory,
    HowToCompute,
    Model,
    Speculate,
    Tokenizer,
    open_model,
)

if TYPE_CHECKING:
    from dryvine.trainer.data.tokenizer import Vocabulary
    from dryvine.trainer.generate.dialogue import Dialogue
    from dryvine.trainer.generate.requests import Completion, Request
    from dryvine.trainer.generate.sampler import Sampler
    from dryvine.trainer.hand_off.tokenizer_files import TokenizerFiles

MaxTokens = Annotated[int, typer.Option(min=1, help="Of an answer, at most.")]
Temperature = Annotated[float, typer.Option(min=0, help="0: always the best token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1, help="Sample among the fewest tokens of so much probability.")]
Seed = Annotated[int, typer.Option(help="The same seed, the same text.")]


def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(help="Text to go on from; - reads lines of stdin.")] = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    samples: Annotated[int, typer.Option(min=1, help="Continuations of each prompt.")] = 1,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    expert_memory: ExpertMemory = "",
    speculate: Speculate = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="A line of JSON for each: text, tokens, log-probabilities, routes.")
    ] = False,
) -> None:
    """Continue texts. All prompts are decoded side by side; a single one is streamed. Tokens depend on the seed, the
    prompt and the weights only: not on the other prompts nor on their order."""
    from dryvine.trainer.generate.dialogue import document
    from dryvine.trainer.generate.requests import Request

    asked = list(_lines(prompts or [""]))
    opened = open_model(model, HowToCompute(dtype, device, expert_memory, speculate), tokenizer)
    sampler, files = opened.sampler, opened.files
    stop = frozenset({files.vocabulary.end})
    requests = [
        Request(document(files.vocabulary, text), max_tokens, temperature, top_p, seed + i, stop, number)
        for number, text in enumerate(asked)
        for i in range(samples)
    ]
    started, made = time.perf_counter(), Made()
    if len(requests) == 1 and not as_json:
        sys.stdout.write(asked[0])
        made.add(_stream(sampler, requests[0], files.vocabulary))
    else:
        for completion in sampler.generate(requests):
            assert completion.request.group is not None
            _print(asked[completion.request.group], completion, files, as_json)
            made.add(Streamed.of(completion))
    made.report(time.perf_counter() - started)
    if opened.pages is not None:
        f = opened.pages.figures
        print(f"experts: {f.hit_rate:.1%} were there, {f.bytes_read / 1e6:,.0f} MB read", file=sys.stderr)
    if made.code:
        raise typer.Exit(made.code)


def chat(
    model: Model,
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    expert_memory: ExpertMemory = "",
    speculate: Speculate = False,
) -> None:
    """Chat with a model in the terminal, by the template it was fine-tuned with or that came with its tokenizer.
    Ctrl-C ends an answer; /new starts a new conversation; an empty line or Ctrl-D exits."""
    from dryvine.trainer.generate.requests import Request

    opened = open_model(model, HowToCompute(dtype, device, expert_memory, speculate), tokenizer)
    sampler, source = opened.sampler, opened.source
    dialogue = source.dialogue(opened.files)
    first = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    console = Console(stderr=True)
    while said := _ask(console):
        if said == "/new":
            messages = list(first)
            continue
        messages.append({"role": "user", "content": said})
        prompt = dialogue.prompt(messages)
        room = min(max_tokens, source.shape.max_position - len(prompt))
        if room < 1:
            console.print(f"The conversation fills the model's {source.shape.max_position} positions: /new begins anew")
            messages.pop()
            continue
        answer = _stream(sampler, Request(prompt, room, temperature, top_p, seed, dialogue.stop), dialogue)
        messages.append({"role": "assistant", "content": dialogue.text(answer.tokens)})
        seed += 1


def _lines(prompts: Sequence[str]) -> Iterator[str]:
    for prompt in prompts:
        if prompt == "-":
            yield from (line.rstrip("\n") for line in sys.stdin)
        else:
            yield prompt


class Streamed(NamedTuple):
    """What was printed, the exit code, and how many tokens MTP guessed, and how many rightly."""

    tokens: list[int]
    code: int
    drafted: int = 0
    accepted: int = 0

    @staticmethod
    def of(done: Completion) -> Streamed:
        return Streamed(done.tokens.tolist(), int(done.reason == "failed"), done.drafted, done.accepted)


@dataclass
class Made:
    """What a command has made so far."""

    code: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, one: Streamed) -> None:
        self.code |= one.code
        self.tokens += len(one.tokens)
        self.drafted += one.drafted
        self.accepted += one.accepted

    def report(self, seconds: float) -> None:
        print(f"{self.tokens} tokens in {seconds:.2f} s, {self.tokens / seconds:.0f} a second", file=sys.stderr)
        if self.drafted:
            share = self.accepted / self.drafted
            print(f"drafts: {self.accepted:,} of {self.drafted:,} accepted ({share:.1%})", file=sys.stderr)


def _stream(sampler: Sampler, request: Request, text: Dialogue | Vocabulary) -> Streamed:
    """Print an answer as its tokens arrive; Ctrl-C ends it."""
    from dryvine.trainer.generate.dialogue import Stream

    stream, seen = Stream(text), list[int]()

    def until(_: Request, tokens: list[int]) -> bool:
        seen[:] = tokens
        sys.stdout.write(stream.more(tokens))
        sys.stdout.flush()
        return False

    try:
        (completion,) = sampler.generate([request], until)
    except KeyboardInterrupt:
        print()
        return Streamed(seen, 130)
    print(stream.rest(completion.tokens.tolist()))
    if completion.reason == "failed":
        print(completion.why, file=sys.stderr)
    return Streamed.of(completion)


def _print(prompt: str, completion: Completion, files: TokenizerFiles, as_json: bool) -> None:
    from dryvine.trainer.generate.dialogue import text_of

    text = text_of(files.vocabulary, completion.tokens.tolist())
    if not as_json:
        print(f"{prompt}{text}\n---" if completion.reason != "failed" else f"{prompt}\n{completion.why}\n---")
        return
    row = {
        "prompt": prompt,
        "text": text,
        "seed": completion.request.seed,
        "reason": completion.reason,
        "why": completion.why,
        "tokens": completion.tokens.tolist(),
        "logprobs": [round(value, 6) for value in completion.logprobs.tolist()],
        "routes": completion.routes.tolist(),
        "drafted": completion.drafted,
        "accepted": completion.accepted,
    }
    print(json.dumps(row, ensure_ascii=False))


def _ask(console: Console) -> str:
    try:
        return console.input("[bold]> [/]").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
