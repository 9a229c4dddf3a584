"""Generation on one process: decoding is the training forward, whatever is in the batch."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dryvine.trainer.generate import decoder
from dryvine.trainer.generate.requests import Request
from dryvine.trainer.generate.sampler import Room, Sampler
from dryvine.trainer.generate.sampling import Ways, sample, uniforms
from dryvine.trainer.generate.score import Passage
from dryvine.trainer.model.decoder import Model
from tests.support.generate import SHAPES, by_request, largest_difference, requests_of, same, training_forward
from tests.support.model import filled, tiny


def sampler_of(model: Model, slots: int = 512) -> Sampler:
    return Sampler.alone(model, Room(slots))


@pytest.mark.parametrize("name", SHAPES)
def test_decoding_is_the_training_forward_at_every_prefix(name: str) -> None:
    model = filled(tiny(**SHAPES[name]))
    completions = list(sampler_of(model, slots=7).generate(requests_of(16)))
    assert len(completions) == 16
    assert max(largest_difference(model, completion) for completion in completions) < 1e-5


@pytest.mark.parametrize("slots", [1, 3, 512])
def test_neither_company_nor_order_nor_slots_change_an_answer(slots: int) -> None:
    model, requests = filled(tiny()), requests_of(24)
    together = by_request(sampler_of(model).generate(requests))
    shuffled = random.Random(1).sample(requests, len(requests))
    again = by_request(sampler_of(model, slots).generate(shuffled))
    for request, completion in together.items():
        assert same(completion, again[request])
        (alone,) = sampler_of(model).generate([request])
        assert same(completion, alone)


def test_groups_and_what_they_share_change_no_answer() -> None:
    model, prompt = filled(tiny()), tuple(range(20))
    made = [Request((*prompt, *range(30, 30 + i % 3)), 12, seed=i, group=i % 2) for i in range(10)]
    grouped = list(sampler_of(model, slots=6).generate(made))
    assert max(largest_difference(model, completion) for completion in grouped) < 1e-5
    alone = {
        c.request.seed: c.tokens for c in sampler_of(model).generate(Request(r.prompt, 12, seed=r.seed) for r in made)
    }
    assert all(torch.equal(c.tokens, alone[c.request.seed]) for c in grouped)


def test_a_long_prompt_is_fed_in_pieces_to_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, request = filled(tiny()), Request(tuple(i % 67 for i in range(50)), 8)
    (whole,) = sampler_of(model).generate([request])
    monkeypatch.setattr(decoder, "STRETCH", 7)
    (pieces,) = sampler_of(model).generate([request])
    assert torch.equal(whole.tokens, pieces.tokens)
    assert largest_difference(model, pieces) < 1e-5


@pytest.mark.parametrize("slots", [1, 3, 512])
def test_texts_are_scored_as_they_were_sampled(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(tiny())
    monkeypatch.setattr(decoder, "STRETCH", 7)
    made = [Request(r.prompt, r.max_tokens, 1.0, seed=r.seed, group=r.group) for r in requests_of(24)]
    made += [Request(r.prompt, 9, 0.0, seed=r.seed) for r in made[:6]]
    completions = sorted(sampler_of(model).generate(made), key=lambda c: (c.request.prompt, c.request.temperature))
    passages = [Passage((*c.request.prompt, *c.tokens.tolist()), len(c.request.prompt)) for c in completions]
    scores = list(sampler_of(model, slots).score(passages))
    for completion, score in zip(completions, scores, strict=True):
        assert (completion.logprobs - score.logprobs).abs().max() < 1e-5
        assert completion.request.temperature > 0 or score.best.all()
    assert not all(score.best.all() for score in scores)


@pytest.mark.parametrize("passage", [Passage((1,)), Passage((1, 2), 2), Passage((1, 2), 0), Passage((1,) * 66)])
def test_a_passage_that_cannot_be_scored_is_refused(passage: Passage) -> None:
    with pytest.raises(ValueError, match="a passage of"):
        list(sampler_of(filled(tiny(max_position=64))).score([passage]))


def test_the_next_token_is_the_updated_models() -> None:
    model, request = filled(tiny()), Request((1, 2, 3), 10, temperature=0)
    sampler = sampler_of(model)
    (before,) = sampler.generate([request])
    with torch.no_grad():
        for _, weight in model.named_parameters():
            weight.mul_(1.5)
    (after,) = sampler.generate([request])
    assert largest_difference(model, after) < 1e-5
    assert not torch.equal(before.logprobs, after.logprobs)


def test_answers_end_by_stop_length_callback_and_cancel() -> None:
    model, sampler = (made := filled(tiny())), sampler_of(made)
    base = Request((5, 6), 30, seed=4)
    (free,) = sampler.generate([base])
    third = int(free.tokens[2])
    first = free.tokens.tolist().index(third)
    (stopped,) = sampler.generate([Request((5, 6), 30, seed=4, stop=frozenset([third]))])
    (asked,) = sampler.generate([base], until=lambda request, tokens: len(tokens) == 5)
    assert (free.reason, len(free.tokens)) == ("length", 30)
    assert (stopped.reason, stopped.tokens.tolist()) == ("stop", free.tokens[: first + 1].tolist())
    assert (asked.reason, asked.tokens.tolist()) == ("callback", free.tokens[:5].tolist())
    short, long = Request((5, 6), 3, seed=1), Request((5, 6), 30, seed=2)
    endings = []
    for completion in sampler.generate([short, long, base]):
        endings.append((completion.request.seed, completion.reason, len(completion.tokens)))
        sampler.cancel(long)
    assert sorted(endings) == [(1, "length", 3), (2, "cancelled", 3), (4, "length", 30)]
    assert largest_difference(model, asked) < 1e-5


def test_a_cancelled_answer_takes_part_in_no_further_step(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, widths, step = sampler_of(filled(tiny())), [], decoder.Decoder.step

    def counted(*given: Any) -> Any:
        widths.append(len(given[2][0].tokens))
        return step(*given)

    monkeypatch.setattr(decoder.Decoder, "step", counted)
    long = Request((5, 6), 30, seed=2)
    for _ in sampler.generate([Request((5, 6), 3), long, Request((5, 6), 5)]):
        sampler.cancel(long)
    assert widths == [3, 3, 3, 1, 1]


def test_what_is_done_meanwhile_is_between_a_steps_launch_and_the_read_of_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler, seen, step, exchange = sampler_of(filled(tiny())), [], decoder.Decoder.step, decoder.Decoder._exchange

    def launched(*given: Any) -> Any:
        coming = step(*given)
        seen.append("launched")
        return coming

    def read(*given: Any) -> Any:
        seen.append("read")
        return exchange(*given)

    monkeypatch.setattr(decoder.Decoder, "step", launched)
    monkeypatch.setattr(decoder.Decoder, "_exchange", read)
    assert len([*sampler.generate([Request((5, 6), 3)], None, lambda: seen.append("meanwhile"))]) == 1
    assert seen == ["launched", "meanwhile", "read"] * 3


def test_an_error_raised_meanwhile_ends_the_call_and_not_the_sampler() -> None:
    sampler, requests = sampler_of(filled(tiny())), [Request((5, 6), 5), Request((7,), 4)]
    first = [completion.tokens.tolist() for completion in sampler.generate(requests)]

    def raising() -> None:
        raise OSError("a verifier is gone")

    with pytest.raises(OSError, match="a verifier is gone"):
        next(sampler.generate(requests, None, raising))
    assert [completion.tokens.tolist() for completion in sampler.generate(requests)] == first


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (Request((), 3), "empty"),
        (Request((1, 99), 3), "token 99"),
        (Request((1,), 0), "max_tokens = 0"),
        (Request((1,) * 60, 6), "64 positions"),
        (Request((1,), 3, temperature=-1.0), "temperature"),
        (Request((1,), 3, temperature=float("nan")), "temperature"),
        (Request((1,), 3, top_p=0.0), "top_p"),
    ],
)
def test_a_request_that_cannot_be_answered_says_why_and_hurts_no_other(wrong: Request, why: str) -> None:
    good = requests_of(4)
    sampler = sampler_of(filled(tiny()), slots=2)
    ended = by_request(sampler.generate([good[0], wrong, *good[1:]]))
    assert (ended[wrong].reason, len(ended[wrong].tokens)) == ("failed", 0)
    assert why in ended[wrong].why
    alone = by_request(sampler.generate(good))
    assert all(same(ended[request], alone[request]) for request in good)


def test_a_callback_that_raises_ends_its_own_answer() -> None:
    sampler, requests = sampler_of(filled(tiny())), [Request((1, 2), 9, seed=i) for i in range(4)]

    def until(request: Request, tokens: list[int]) -> bool:
        if request.seed == 1:
            sys.exit(7)
        return bool(request.seed == 2 and 1 // (3 - len(tokens)) and False)

    ended = by_request(sampler.generate(requests, until))
    assert [ended[request].reason for request in requests] == ["length", "failed", "failed", "length"]
    assert "SystemExit: 7" in ended[requests[1]].why
    assert "ZeroDivisionError" in ended[requests[2]].why
    assert len(ended[requests[2]].tokens) == 3


def test_numbers_that_are_not_finite_end_an_answer_and_do_not_stay_in_its_slot() -> None:
    model = filled(tiny())
    with torch.no_grad():
        dict(model.named_parameters())["embed.weight"][13] = float("inf")
    bad, good = Request((1, 13, 2), 5), Request((1, 4, 2), 12, seed=3)
    sampler = sampler_of(model, slots=1)
    failed, fine = sampler.generate([bad, good])
    assert (failed.reason, fine.reason) == ("failed", "length")
    assert "not finite" in failed.why
    assert largest_difference(model, fine) < 1e-5


def test_slots_and_memory_are_used_again() -> None:
    """Over many requests from an iterator that would not fit into memory at once; the cache does not grow."""
    sampler = sampler_of(filled(tiny(layers=1)), slots=4)
    taken = 0

    def many() -> Iterator[Request]:
        nonlocal taken
        for seed in range(400):
            taken += 1
            yield Request((seed % 60, 2), 1 + seed % 5, seed=seed)

    ended = 0
    for completion in sampler.generate(many()):
        ended += 1
        assert taken - ended <= 5
        assert completion.reason == "length"
    assert ended == 400


def test_tokens_follow_the_distribution_and_log_probabilities_are_of_the_full_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")]).expand(20_000, -1)
    requests = [Request((0,), 1, temperature=2.0, top_p=p, seed=seed) for seed in range(10_000) for p in (1.0, 0.8)]
    tokens, logprobs = sample(logits, Ways.of(requests, torch.device("cpu")), np.ones(20_000, np.uint64))
    full = (logits[0] / 2).log_softmax(-1)
    assert torch.allclose(logprobs, full[tokens])
    frequencies = torch.bincount(tokens[0::2], minlength=5) / 10_000
    assert (frequencies - full.exp()).abs().max() < 0.02
    # 0.455 + 0.276 < 0.8 <= with 0.167: the fourth is never drawn.
    cut = torch.bincount(tokens[1::2], minlength=5) / 10_000
    assert (cut[:3] - full[:3].softmax(-1)).abs().max() < 0.02
    assert cut[3:].tolist() == [0.0, 0.0]


def test_uniforms_are_uniform_and_depend_on_seed_and_position() -> None:
    seeds, positions = np.divmod(np.arange(40_000, dtype=np.uint64), np.uint64(200))
    u = uniforms(seeds, positions)
    assert u.min() >= 0
    assert u.max() < 1
    assert len(np.unique(u)) == len(u)
    counts = np.histogram(u, 20, (0, 1))[0]
    assert np.abs(counts - 2000).max() < 250
    grid = u.reshape(200, 200)
    assert np.abs(np.corrcoef(grid)[0, 1:]).max() < 0.35
    assert np.abs(np.corrcoef(grid.T)[0, 1:]).max() < 0.35


def test_bf16_decodes_close_to_its_training_forward() -> None:
    model = filled(tiny(), dtype=torch.bfloat16)
    for completion in sampler_of(model).generate(requests_of(6, temperature=1.0)):
        logprobs, _ = training_forward(model, [*completion.request.prompt, *completion.tokens.tolist()][:-1])
        there = logprobs[len(completion.request.prompt) - 1 :].gather(1, completion.tokens.unsqueeze(1)).squeeze(1)
        assert (there - completion.logprobs).abs().median() < 0.05


@pytest.mark.long
def test_memory_is_flat_over_ten_thousand_requests() -> None:
    """Resident memory after 2,000 and after 10,000, some of which are refused, cancelled or fail."""
    sampler, pages = sampler_of(filled(tiny(layers=2)), slots=64), os.sysconf("SC_PAGE_SIZE")
    resident, reasons = [], Counter[str]()

    def until(request: Request, tokens: list[int]) -> bool:
        return request.seed % 7 == 0 and 1 // (request.seed % 2) > 0

    made = (Request((i % 60, 2) * (1 + i % 40 // 39 * 40), 1 + i % 5, seed=i, group=i // 8) for i in range(10_000))
    for number, completion in enumerate(sampler.generate(made, until)):
        reasons[completion.reason] += 1
        if completion.request.seed % 11 == 0:
            sampler.cancel(Request((), 1), completion.request)
        if number in (2000, 9999):
            gc.collect()
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * pages)
    assert sum(reasons.values()) == 10_000
    assert set(reasons) == {"length", "failed", "callback"}
    assert resident[1] - resident[0] < 4 << 20


@pytest.mark.long
def test_transformers_generates_the_same_tokens_from_the_same_weights() -> None:
    from benchmarks.generate import compare

    row = compare("1m", sequences=3, new=6, device="cpu", dtype=torch.float32)
    assert row["same_tokens"] == 1.0


def test_of_the_peers_ways_only_those_that_it_lacks_or_that_do_not_fit_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any other error is a fault of the comparison."""
    from benchmarks import generate

    def broken(model: Model, way: str) -> Any:
        if way == "full":
            raise torch.OutOfMemoryError("tried to allocate 116 GiB")
        if way == "broken":
            raise RuntimeError("shapes do not match")
        return theirs(model, way)

    theirs = generate.theirs
    monkeypatch.setattr(generate, "theirs", broken)
    monkeypatch.setattr(generate, "ROUNDS", 1)
    asked = {"sequences": 2, "new": 2, "device": "cpu", "dtype": torch.float32}
    monkeypatch.setattr(generate, "IMPLEMENTATIONS", ("no such thing", "full", "eager"))
    assert generate.compare("1m", **asked)["trials_of_peer"].keys() == {"eager"}
    monkeypatch.setattr(generate, "IMPLEMENTATIONS", ("broken", "eager"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        generate.compare("1m", **asked)
