"""Comm's kernels under Triton's CPU interpreter, bit for bit against routing.py and payload.py. Run by
test_comm_kernels.py: TRITON_INTERPRET must be set before triton is first imported."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dryvine.comm.dispatch import by_rank, payload, routing, token_plan
from dryvine.comm.dispatch.by_rank import ByRank
from dryvine.comm.dispatch.fake import Fake
from dryvine.comm.dispatch.payload import Format
from dryvine.comm.dispatch.routing import Arrival, Sum
from dryvine.comm.dispatch.single_rank import SingleRank
from dryvine.comm.dispatch.token_plan import PlanGroup
from dryvine.comm.topology import by_sizes
from tests.support.dispatch import Boards, draw, on_ranks, there_and_back
from tests.support.interpreter import right_casts
from tests.support.specialisations import recorded

FUNCTIONS: list[Any] = [
    routing.by_expert,
    routing.stable_order,
    routing.arrive,
    routing.sum_rows,
    payload.gather,
    payload.gather_in,
    payload.gather_out,
    by_rank.gather_by_rank,
    by_rank.sum_by_rank,
    by_rank.sum_present,
    token_plan.places,
]


@pytest.fixture(autouse=True, scope="module")
def _right_casts() -> Iterator[None]:
    with right_casts():
        yield


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether comm takes its kernels, as on a GPU. One at a time: a program's place is a global of the interpreter."""
    lock = threading.Lock()

    def locked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with lock:
                return function(*args)

        return call

    ways = [(function, function.reference, locked(function.kernel)) for function in FUNCTIONS]

    def choose(on: bool) -> None:
        for function, reference, kernel in ways:
            monkeypatch.setattr(function, "reference", kernel if on else reference)

    return choose


def both(native: Callable[[bool], None], compute: Callable[[], Any]) -> tuple[Any, Any]:
    native(True)
    ours = compute()
    native(False)
    return ours, compute()


@pytest.mark.parametrize(
    ("tokens", "ranks", "experts", "top_k"),
    [(37, 4, 8, 3), (0, 2, 4, 2), (70, 1, 300, 8), (200, 2, 2, 1), (40, 3, 6, 6)],
)
def test_order(native: Any, tokens: int, ranks: int, experts: int, top_k: int) -> None:
    chosen = draw(0, tokens, experts, top_k)
    ours, defined = both(native, lambda: routing.by_expert(chosen, ranks, experts))
    for name, tensor in vars(defined).items():
        assert torch.equal(getattr(ours, name), tensor), name
    assert not ours.message[:, -1].any()


@pytest.mark.parametrize(("token", "choices"), [(0, (0, 1)), (60, (1, 2)), (129, (0, 2))])
def test_an_expert_chosen_twice_is_found_wherever_it_is(native: Any, token: int, choices: tuple[int, int]) -> None:
    chosen = draw(1, 130, 8, 3)
    chosen[token, choices[1]] = chosen[token, choices[0]]
    native(True)
    assert routing.by_expert(chosen, 4, 8).message[:, -1].tolist() == [1] * 4


def test_order_of_keys_is_stable(native: Any) -> None:
    keys = torch.randint(0, 5, (90, 4), generator=torch.Generator().manual_seed(2))
    ours, defined = both(native, lambda: routing.stable_order(keys, 5))
    assert torch.equal(ours, defined)


@pytest.mark.parametrize("alignment", [1, 4, 300])
@pytest.mark.parametrize(("ranks", "share"), [(1, 5), (3, 3), (4, 1)])
def test_arrival(native: Any, ranks: int, share: int, alignment: int) -> None:
    message = torch.randint(0, 12, (ranks, share + 1), generator=torch.Generator().manual_seed(3))
    message[-1, 0] = 300  # more than a program writes at a time
    message[0, -2] = 0
    ours, defined = both(native, lambda: Arrival.of(message, message, alignment))
    for name, value in vars(defined).items():
        got = getattr(ours, name)
        assert torch.equal(got, value) if isinstance(value, Tensor) else got == value, name


def special(*size: int) -> Tensor:
    """FP32 over forty binades, so that the order of additions shows; with ties, -0, subnormals, NaN and infinities."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(*size, generator=generator) * 2.0 ** torch.randint(-20, 20, size, generator=generator)
    x[0], x[1], x[2] = -0.0, 2.0**-130, 1 + 2.0**-8
    x[3, 0], x[4, 1] = torch.nan, torch.inf
    return x


def bits(x: Tensor) -> Tensor:
    """Integers to compare; a NaN is a NaN, whatever its payload."""
    return torch.where(x.isnan(), torch.nan, x.float()).view(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 5, 72, 1100])
@pytest.mark.parametrize("apart", [False, True])
def test_sums(native: Any, dtype: torch.dtype, width: int, apart: bool) -> None:
    wide = special(50, width + 11).to(dtype)
    rows = wide[:, 8 : 8 + width] if apart else wide[:, :width].contiguous()
    lengths = torch.tensor([3, 0, 1, 8, 8, 0, 2])
    source = torch.randint(0, 50, (22,), generator=torch.Generator().manual_seed(5))
    source[0:3] = torch.tensor([0, 0, 0])
    begin = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    ours, defined = both(native, lambda: Sum(source, begin, 8)(rows))
    assert ours.dtype == dtype
    assert torch.equal(bits(ours), bits(defined))
    space = torch.zeros(7, width + 9, dtype=dtype)
    native(True)
    Sum(source, begin, 8)(rows, space[:, 4 : 4 + width])
    assert torch.equal(bits(space[:, 4 : 4 + width]), bits(defined))
    assert not space[:, :4].any()
    assert not space[:, 4 + width :].any()


def test_the_order_of_additions_shows(native: Any) -> None:
    """Else the test above could not fail."""
    rows, source, begin = special(50, 64), torch.arange(48), torch.arange(0, 49, 8)
    native(False)
    forward, backward = Sum(source, begin, 8)(rows), Sum(source.view(6, 8).flip(1).flatten(), begin, 8)(rows)
    assert not torch.equal(bits(forward), bits(backward))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 5, 1100])
def test_own_rows_are_read_where_they_are(native: Any, dtype: torch.dtype, width: int) -> None:
    """Whatever lies in their place in the window."""
    drawn = special(77, width + 1)[:, :width].to(dtype)
    window, own = drawn[:60].reshape(3, 20, width), drawn[60:].contiguous() + 1
    window[1] = torch.nan
    sent, index = ByRank(window, own, 1), torch.tensor([3, -1, 20, 36, 40, 19, -1, 0])
    source = torch.tensor([[20, 3, -1], [-1, -1, -1], [59, -1, 36], [-1, 40, -1]])
    ways = (
        lambda: by_rank.gather_by_rank(sent, index),
        lambda: by_rank.sum_by_rank(sent, source),
        lambda: by_rank.sum_present(sent.whole(), source),
    )
    picked, *sums = (both(native, way) for way in ways)
    for ours, defined in (picked, *sums):
        assert ours.dtype == dtype
        assert torch.equal(bits(ours), bits(defined))
    assert torch.equal(bits(picked[0][[2, 3]]), bits(own[[0, 16]]))
    assert not picked[0][[1, 6]].any()


def everybodys(seed: int, ranks: int, most: int, experts: int, top_k: int, tokens: int) -> tuple[ByRank, Tensor]:
    """Choices of all ranks as they came, this one's apart; the last rank has fewer tokens too."""
    rank = seed % ranks
    window = torch.stack([draw(seed + 10 * r, most, experts, top_k) for r in range(ranks)])
    window[-1, most - 1] = token_plan.ABSENT
    own = token_plan.choices_to_send(draw(seed + 99, tokens, experts, top_k), most)
    window[rank] = -7  # old
    return ByRank(window.to(torch.int32), own, rank), own[:tokens].to(torch.int64)


@pytest.mark.parametrize(
    ("ranks", "most", "experts", "top_k", "tokens", "alignment", "room"),
    [
        (2, 37, 8, 3, 37, 1, "all"),
        (3, 150, 6, 2, 1, 8, "all"),
        (2, 130, 80, 8, 100, 1, "less"),
        (4, 33, 8, 1, 0, 1, "all"),
        (8, 12, 8, 4, 12, 8, "less"),
    ],
)
def test_places(
    native: Any, ranks: int, most: int, experts: int, top_k: int, tokens: int, alignment: int, room: str
) -> None:
    chosen, own = everybodys(ranks, ranks, most, experts, top_k, tokens)
    rows = chosen.window.numel() + alignment * experts if room == "all" else most * top_k // 2
    ours, defined = both(native, lambda: token_plan.places(chosen, own, PlanGroup(experts, alignment), rows))
    for name, tensor in vars(defined).items():
        assert torch.equal(getattr(ours, name), tensor), name
    assert not ours.message[experts // ranks : -1].any()
    assert (ours.row >= 0).sum() == (ours.pair >= 0).sum()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_chose_an_expert_twice_is_named(native: Any, rank: int) -> None:
    chosen, own = everybodys(1, 3, 300, 6, 3, 300)
    where = chosen.own if rank == chosen.rank else chosen.window[rank]
    where[290, 0] = where[290, 2]
    for told in both(native, lambda: token_plan.places(chosen, own, PlanGroup(6, 1), 2700).message[2:-1].tolist()):
        assert told == [int(r == rank) for r in range(3)]


def octets(*size: int) -> Tensor:
    return torch.randint(0, 255, size, dtype=torch.uint8)


PAYLOADS: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "fp8": lambda: (octets(30, 256), octets(30, 2), torch.rand(30)),
    "bf16": lambda: (torch.randn(30, 24).bfloat16(), torch.rand(30)),
    "odd": lambda: (torch.randn(30, 5), octets(30, 3), torch.rand(30, 2, 3)),
}


@pytest.mark.parametrize("kind", PAYLOADS)
def test_payload(native: Any, kind: str) -> None:
    tensors, order = PAYLOADS[kind](), torch.randperm(30)
    wire = Format.of(tensors)
    index = torch.tensor([3, -1, 0, 29, 29, -1])

    def there() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        buffer = wire.pack(tensors, [order] * len(tensors))
        return wire.unpack(buffer), wire.unpack(buffer, index), [payload.gather(t, index) for t in tensors]

    for ours, defined in zip(*both(native, there), strict=True):
        for tensor, got, want in zip(tensors, ours, defined, strict=True):
            assert got.shape[1:] == tensor.shape[1:]
            assert torch.equal(got, want)
    native(True)
    (plain, _, picked) = there()
    assert all(torch.equal(p, t[order]) for p, t in zip(plain, tensors, strict=True))
    assert all(torch.equal(p[0], t[3]) and not p[1].any() for p, t in zip(picked, tensors, strict=True))


@pytest.mark.parametrize(("sizes", "alignment", "chunks"), [([1], 1, 1), ([1], 8, 4), ([2, 2], 4, 2), ([2, 1], 1, 1)])
@pytest.mark.parametrize("name", ["flat", "hierarchical"])
def test_a_layers_journey(native: Any, name: str, sizes: list[int], alignment: int, chunks: int) -> None:
    """Every tensor that layout, dispatch, combine and their backwards give, over all ranks."""
    experts, noise = 3 * sum(sizes), torch.Generator().manual_seed(0)
    tokens = [7 * rank + 4 for rank in range(sum(sizes))]
    chosen = [draw(rank, t, experts, 3) for rank, t in enumerate(tokens)]
    rows, grads = ([torch.randn(t, 24, generator=noise).bfloat16() for t in tokens] for _ in range(2))
    weights = [torch.rand(t, 3, generator=noise) for t in tokens]

    def journey() -> list[list[Tensor]]:
        boards = Boards(by_sizes(sizes))

        def one(rank: int) -> list[Tensor]:
            extra = () if name == "flat" else (chunks,)
            dispatcher = getattr(boards, name)(rank, experts, alignment, *extra)
            weigh = weights[rank].bfloat16()
            _, parts, sums, values = there_and_back(dispatcher, chosen[rank], rows[rank], weigh, grads[rank])
            return [*parts, sums, values]

        return on_ranks(sum(sizes), one)

    for ours, defined in zip(*both(native, journey), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, defined, strict=True))


@pytest.mark.parametrize("name", ["flat", "hierarchical"])
def test_no_routing_needs_a_kernel_of_its_own(native: Any, name: str) -> None:
    """A kernel that is first loaded in the middle of a run waits for the device, which may wait for a peer."""
    native(True)
    sizes, experts, boards = [2, 1], 6, Boards(by_sizes([2, 1]))

    def layer(seed: int) -> None:
        def one(rank: int) -> None:
            extra = () if name == "flat" else (2,)
            dispatcher = getattr(boards, name)(rank, experts, 4, *extra)
            generator = torch.Generator().manual_seed(seed)
            skew = torch.rand(experts, generator=generator) * 3
            chosen = (torch.rand(20, experts, generator=generator) + skew).argsort(dim=1)[:, :3].contiguous()
            rows, grads = torch.randn(2, 20, 24).bfloat16()
            there_and_back(dispatcher, chosen, rows, torch.rand(20, 3).bfloat16(), grads)

        on_ranks(sum(sizes), one)

    with recorded() as rehearsed:
        layer(0)
    with recorded() as later:
        for seed in range(1, 4):
            layer(seed)
    assert not [variant[0] for variant in later - rehearsed]


def test_fake(native: Any) -> None:
    chosen, rows, weights = draw(0, 20, 16, 4), torch.randn(20, 24).bfloat16(), torch.rand(20, 4)

    def journey() -> list[Any]:
        fake = Fake(by_sizes([4, 4]), 1, 16, alignment=8)
        handle = fake.plan_routing(chosen).wait()
        got, values = fake.dispatch((rows,), weights, handle).wait()
        return [handle.counts, handle.sends, got, values, *fake.combine(got, values, handle).wait()]

    for ours, defined in zip(*both(native, journey), strict=True):
        assert torch.equal(ours, defined) if isinstance(ours, Tensor) else ours == defined


@pytest.mark.parametrize("alignment", [1, 8])
def test_alone(native: Any, alignment: int) -> None:
    chosen, rows, weights = draw(0, 20, 16, 4), torch.randn(20, 24).bfloat16(), torch.rand(20, 4)

    def journey() -> list[Any]:
        dispatcher = SingleRank(16, alignment)
        handle = dispatcher.plan_routing(chosen).wait()
        got, values = dispatcher.dispatch((rows,), weights, handle).wait()
        return [handle.counts, got, values, *dispatcher.combine(got, values, handle).wait()]

    for ours, defined in zip(*both(native, journey), strict=True):
        assert torch.equal(ours, defined) if isinstance(ours, Tensor) else ours == defined
