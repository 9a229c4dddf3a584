"""An update of reinforcement learning: rows, the gradient in every split and layout, and replayed experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from dryvine.comm import local
from dryvine.trainer.config import Config
from dryvine.trainer.deviations import Part, assembled
from dryvine.trainer.generate.requests import Request
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.documents import documents_of
from dryvine.trainer.model.loss import target_logprobs
from dryvine.trainer.model.shape import blocks
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.rig import Rig
from dryvine.trainer.rl.choices import LossChoices
from dryvine.trainer.rl.losses import k3
from dryvine.trainer.rl.passes import PassOptions, UpdateResult, learn, score
from dryvine.trainer.rl.rows import PackedRows, Sample, pack
from tests.support.answers import RL, answers_of, bare
from tests.trainer.test_one_rank_schedules import WAYS

Tiny = Callable[..., Config]
CHOICES = LossChoices(kl=0.05, ratio="token", aggregate="token_mean")
PLAIN = PassOptions(temperature=0.7, replay=True)


def test_rows_hold_every_answer_behind_its_prompt(tiny: Tiny) -> None:
    """Rebuilt from the places that the attention core gets: each answer as if it were alone in the world."""
    answers = answers_of(tiny(*RL), 40)
    packing = pack(answers, 32)
    assert packing.rows <= 1 + sum(answer.size for answer in answers) * 11 / 9 / 33
    rows = PackedRows(packing, 0, packing.rows + 1)
    tokens, numbers, shared = rows.tokens(extra=2)
    assert not tokens[packing.rows].any()
    inputs = tokens[:, :32].flatten()
    for number, answer in enumerate(answers):
        assert tokens[packing.places[number].row, 1:][packing.targets(number)].tolist() == answer.tokens.tolist()
    documents = documents_of(numbers, [np.zeros((packing.rows + 1, 32), np.float32)] * 2, "cpu", shared)
    assert documents.order is not None
    read = [inputs[part].tolist() for part in np.split(documents.order, np.cumsum(documents.lengths)[:-1])]
    for answer in answers:
        line = [*answer.prompt, *answer.tokens.tolist()]
        assert line in read or line[:-1] in read  # the last token of a row is only predicted
    for copies in np.split(documents.order, np.cumsum(documents.lengths)[:-1]):
        assert documents.positions[copies].tolist() == list(range(len(copies)))


@pytest.mark.parametrize(("first", "count"), [(0, 9), (1, 2), (3, 4)])
def test_what_is_known_of_an_answer_is_where_its_tokens_are(tiny: Tiny, first: int, count: int) -> None:
    """Columns of the objective where tokens are predicted, experts where they are fed; nothing elsewhere."""
    answers = answers_of(tiny(*RL), 40)
    packing = pack(answers, 32)
    rows = PackedRows(packing, first, count)
    sampled = rows.of_tokens(packing.end_to_end(lambda answer: answer.sampled)).view(count, 32)
    advantages = rows.of_answers(torch.tensor([answer.advantage for answer in answers])).view(count, 32)
    numbers, routes = rows.answer_numbers().view(count, 32), rows.routes(5, 2).view(5, count, 32, 2)
    inside = [i for i, place in enumerate(packing.places) if first <= place.row < first + count]
    assert int((sampled != 0).sum()) == sum(len(answers[i].tokens) for i in inside)
    seen = set()
    for i in inside:
        place, where, answer = packing.places[i], packing.targets(i), answers[i]
        row, before = place.row - first, slice(place.prompt, place.prompt + len(answer.prompt) - 1)
        assert sampled[row, where].tolist() == answer.sampled.tolist()
        assert set(advantages[row, where].tolist()) == {float(torch.tensor(answer.advantage))}
        seen |= {int(number) for number in numbers[row, where].unique()}
        assert torch.equal(torch.cat((routes[:, row, before], routes[:, row, where]), 1), answer.routes)  # type: ignore[arg-type]
    assert seen == set(range(len(inside)))


def test_answers_to_one_question_hold_its_prompt_once_a_row(tiny: Tiny) -> None:
    answers = answers_of(tiny(*RL), 8)
    prompt = (5, 6, 7, 8, 9, 10)
    packing = pack([replace(answer, prompt=prompt, routes=None) for answer in answers], 200)
    assert packing.rows == 1
    tokens = PackedRows(packing, 0, 1).tokens(1)[0]
    assert int((tokens[0] > 0).sum()) <= 5 + sum(1 + len(answer.tokens) for answer in answers)
    assert {place.prompt for place in packing.places} == {0}


def test_attention_gets_at_most_twice_a_row(tiny: Tiny) -> None:
    """However long the prompt is that hundreds of short answers share: memory is planned for that much."""
    one = answers_of(tiny(*RL), 1)[0]
    short = replace(one, prompt=tuple(range(1, 81)), tokens=one.tokens[:1], sampled=one.sampled[:1], routes=None)
    packing = pack([short] * 60, 199)
    rows = PackedRows(packing, 0, packing.rows)
    _, numbers, shared = rows.tokens(1)
    documents = documents_of(numbers, [np.zeros((packing.rows, 199), np.float32)], "cpu", shared)
    assert sum(documents.lengths) <= 2 * 199 * packing.rows
    assert packing.rows == 30  # two in each: 79 + 2 x 81 tokens for attention, and padding of 116


def test_an_answer_that_fits_in_no_row_is_refused() -> None:
    exact = Sample((1,) * 20, torch.ones(13, dtype=torch.int64), torch.zeros(13))
    assert pack([exact], 32).rows == 1
    with pytest.raises(ValueError, match=r"34 tokens, and a row 32 \+ 1: raise data.seq_len"):
        pack([replace(exact, prompt=(1,) * 21)], 32)


def test_log_probabilities_are_those_of_the_softmax_at_the_temperature() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(9, 31, requires_grad=True), torch.randint(31, (9,))
    expected = (logits / 0.7).log_softmax(-1)
    picked = expected.gather(1, targets[:, None]).squeeze(1)
    weights = torch.randn(9)
    (wanted,) = torch.autograd.grad((picked * weights).sum(), logits)
    again = logits.detach().clone().requires_grad_()
    found = target_logprobs(again * 1.0, targets, 0.7)
    torch.testing.assert_close(found.logprobs, picked)
    torch.testing.assert_close(found.entropies, -(expected.exp() * expected).sum(-1))
    (grad,) = torch.autograd.grad((found.logprobs * weights).sum(), again)
    torch.testing.assert_close(grad, wanted)


# -- the same update everywhere


def played(
    rank: int, config: Config, answers: list[Sample], steps: int = 1
) -> tuple[UpdateResult, Part, Part, list[np.ndarray]]:
    """For `local.run`: figures, gradients and weights of this rank after updates, and the scores before them."""
    rig = bare(config)
    before = [answer.old.numpy() for answer in score(rig, answers, PLAIN)]  # type: ignore[union-attr]
    for step in range(steps):
        learnt = learn(rig, answers, CHOICES, PLAIN, step)
    grads = {(p.name, p.start): p.grad.numpy().copy() for p in rig.optimizer.pieces}
    weights = {(p.name, p.start): p.master.numpy().copy() for p in rig.optimizer.pieces}
    return learnt, grads, weights, before


def compare(one: Config, many: Config, answers: list[Sample]) -> None:
    alone = played(0, one, answers)
    parts = (
        local.run(played, many.parallel.world, many, answers) if many.parallel.world > 1 else [played(0, many, answers)]
    )
    for part in parts:
        assert part[0].norm == pytest.approx(alone[0].norm, rel=1e-5)
        assert part[0].loss == pytest.approx(alone[0].loss, rel=1e-5)
        assert part[0].sums == pytest.approx(alone[0].sums, rel=1e-5)
        for scores, expected in zip(part[3], alone[3], strict=True):
            np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    for which in (1, 2):
        whole, expected = assembled([part[which] for part in parts]), assembled([alone[which]])
        for name, values in expected.items():
            apart = np.linalg.norm(whole[name] - values) / max(1e-30, np.linalg.norm(values))
            assert apart < 1e-5, (name, apart)


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.microbatch_sequences=4",),
        ("data.seq_len=20",),
        ("batch.sequences=2",),
        ('model.recompute=["norm", "mla_up", "swiglu"]',),
        ("parallel.dp=2", "parallel.schedule=dualpipev", "batch.sequences=4"),
        ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe"),
    ],
    ids=["microbatches", "packs", "passes", "recompute", "dp2 in passes", "pp2 x ep2 dualpipe"],
)
def test_an_update_is_the_same_in_every_split_and_layout(tiny: Tiny, layout: tuple[str, ...]) -> None:
    answers = answers_of(tiny(*RL))
    compare(tiny(*RL), tiny(*RL, *layout), answers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recompute", ["[]", "['norm','swiglu','mla_up']", "['layer']"])
def test_on_a_gpu_graphs_change_no_bit_of_an_update(tiny: Tiny, recompute: str) -> None:
    """Updates without graphs, recorded, replayed, recorded anew for more answers, and replayed. Documents are a block
    of the kernel at most, whose gradients it sums in one order."""
    words = (*RL, "parallel.pp=1", "parallel.ep=1", "parallel.microbatch_sequences=4", f"model.recompute={recompute}")
    found = []
    for way in ("on", "off"):
        rig = bare(tiny(*words, *WAYS["bf16"], f"parallel.graphs={way}"), "cuda")
        counts = enumerate((12, 6, 9, 24, 24))
        seen = [learn(rig, answers_of(rig.config, n, seed=step), CHOICES, PLAIN, step) for step, n in counts]
        weights = {name: weight.detach().cpu() for name, weight in rig.model.named_parameters()}
        found.append(([replace(one, bubble=0.0) for one in seen], weights))
    (ours, weights), (theirs, others) = found
    assert ours == theirs
    assert not [name for name, value in weights.items() if not torch.equal(value, others[name])]


def test_a_share_by_microbatch_would_be_seen(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above is for: an update whose mean forgets how many microbatches there are."""
    answers = answers_of(tiny(*RL))
    alone = played(0, tiny(*RL), answers)
    other = played(0, tiny(*RL), [*answers[:-1], replace(answers[-1], advantage=0.5)])
    assert abs(other[0].norm / alone[0].norm - 1) > 1e-4


# -- experts


def live_routes(rig: Rig, answers: list[Sample]) -> list[Sample]:
    return score(rig, answers, PassOptions(0.7, replay=False, record=True))


def test_a_pass_records_the_experts_that_gates_choose(tiny: Tiny) -> None:
    """And replaying them changes nothing, while others do."""
    rig = bare(tiny(*RL))
    answers = answers_of(rig.config)
    recorded = live_routes(rig, answers)
    assert all(a.routes.shape == (5, a.size - 1, 2) for a in recorded)  # type: ignore[union-attr]
    same = score(rig, recorded, PassOptions(0.7, replay=True))
    other = score(rig, answers, PassOptions(0.7, replay=True))
    for one, two, three in zip(recorded, same, other, strict=True):
        torch.testing.assert_close(one.old, two.old, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(one.old, three.old, atol=1e-4)  # type: ignore[arg-type]
    learnt = learn(rig, recorded, CHOICES, PLAIN, 0)
    assert learnt.other_routes == 0
    assert learn(bare(tiny(*RL)), answers, CHOICES, PLAIN, 0).other_routes > 0.3


def test_layouts_record_the_same_experts(tiny: Tiny) -> None:
    layout = ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe")
    answers = answers_of(tiny(*RL))
    alone = live_routes(bare(tiny(*RL)), answers)
    for found in local.run(recorded_on, 4, tiny(*RL, *layout), answers):
        for one, other in zip(alone, found, strict=True):
            np.testing.assert_array_equal(one.routes, other)


def recorded_on(rank: int, config: Config, answers: list[Sample]) -> list[np.ndarray]:
    return [sample.routes.numpy() for sample in live_routes(bare(config), answers)]  # type: ignore[union-attr]


def test_replay_takes_the_choice_and_not_the_weights(tiny: Tiny) -> None:
    """Gates learn from replayed choices, and their biases are frozen."""
    rig = bare(tiny(*RL))
    before = {name: bias.clone() for name, bias in rig.model.buffers.items()}
    learn(rig, answers_of(rig.config), CHOICES, PLAIN, 0)
    gates = {p.name: float(p.grad.abs().sum()) for p in rig.optimizer.pieces if p.name.endswith("gate.weight")}
    assert len(gates) == 6
    assert all(total > 0 for name, total in gates.items() if not name.startswith("mtp"))
    assert all(torch.equal(bias, before[name]) for name, bias in rig.model.buffers.items())
    assert not any(load.any() for load in rig.model.loads.values())


def test_a_gradient_that_is_not_finite_updates_nothing(tiny: Tiny) -> None:
    rig = bare(tiny(*RL))
    before = [p.master.clone() for p in rig.optimizer.pieces]
    broken = [replace(answer, advantage=float("nan")) for answer in answers_of(rig.config)]
    assert not learn(rig, broken, CHOICES, PLAIN, 0).finite
    assert all(torch.equal(p.master, old) for p, old in zip(rig.optimizer.pieces, before, strict=True))


@pytest.mark.long
def test_replay_takes_most_of_the_difference_between_a_bf16_sampler_and_an_fp32_trainer(tiny: Tiny) -> None:
    """R3: what is left are the roundings of one network, and not the outputs of two. Weights are large, so that
    experts matter as in a trained model, and gates are close calls."""
    rig = bare(tiny(*RL, "model.init_std=0.25", "model.routed=8", "model.groups=1", "model.mtp_depth=0"))
    whole = {name: weight.detach() for name, weight in rig.model.named_parameters()} | dict(rig.model.buffers)
    names = tuple(block.name for block in blocks(rig.config.model))
    rounded = Model(Spec(rig.config.model, torch.bfloat16, "cpu"), {0: names}, rig.dispatcher)
    rounded.load(whole)
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(320, (256, 6), generator=draw).tolist()
    requests = [Request(tuple(prompt), 16, seed=number) for number, prompt in enumerate(prompts)]
    answers = [
        Sample(done.request.prompt, done.tokens, done.logprobs, done.routes)
        for done in Sampler.alone(rounded).generate(requests)
    ]
    found = {}
    for replay in (False, True):
        scored = score(rig, answers, PassOptions(1.0, replay=replay))
        apart = torch.cat([one.sampled - one.old for one in scored])  # type: ignore[operator]
        found[replay] = float(k3(apart).mean())
    assert found[True] * 10 < found[False], found
