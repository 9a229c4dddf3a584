"""Rows between ranks in FP8: what arrives, what it weighs, what the experts make of it, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dryvine.comm.dispatch.choose import make_dispatcher
from dryvine.comm.dispatch.payload import Format
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.local import run
from dryvine.comm.mesh import Layout, make_mesh
from dryvine.comm.topology import by_sizes
from dryvine.parallel import overlap
from dryvine.parallel.stage import AS_IS, Explicit, Flight, Grads, Stage, State, StepResult, StreamName
from dryvine.parallel.streams import Baton, CpuStreams, Run
from dryvine.trainer.config import Config
from dryvine.trainer.data.splits import open_data
from dryvine.trainer.fp8 import casts
from dryvine.trainer.fp8.dispatch import Tiles
from dryvine.trainer.fp8.ffn import FP8FFN
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.fp8.recipe import Recipe, preset
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.phases import codec_of
from dryvine.trainer.ramps import points
from dryvine.trainer.rig import make_rig
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.step import accumulate
from dryvine.trainer.tensors.groups import ExpertGroups
from tests.support.model import Alone, in_fp8, random_tokens, run_forward, tiny, train, whole

Tiny = Callable[..., Config]
CPU, MINUTE = torch.device("cpu"), timedelta(seconds=60)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8 if tensor.element_size() == 1 else torch.int32)


def faulty(rows: int, width: int, seed: int) -> Tensor:
    """Random, of many sizes, with a NaN, infinities and a tile of zeros where there are rows for them."""
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=noise) * torch.exp(4 * torch.randn(rows, 1, generator=noise))
    if rows > 3:
        x[0, 3], x[1, -1], x[2, 0], x[3] = torch.nan, torch.inf, -torch.inf, 0
    return x.bfloat16()


# -- what arrives


def arrives(rank: int, tokens: tuple[int, ...], width: int) -> None:
    mesh, tiles = make_mesh(Layout(ep=len(tokens)), CPU, MINUTE), Tiles()
    rows, noise = faulty(tokens[rank], width, rank), torch.Generator().manual_seed(rank)
    weights = torch.rand(len(rows), 3, generator=noise)
    chosen = torch.rand(len(rows), 8, generator=noise).argsort(dim=1)[:, :3]
    for name, imbalance in (("flat", 0.0), ("hierarchical", 0.0), ("fake", 0.0), ("flat", 1.01)):
        dispatcher: Any = make_dispatcher(name, Setup(8, mesh, by_sizes([2, 2])), imbalance)
        handle = dispatcher.plan_routing(chosen).wait()
        *sent, came_weights = dispatcher.dispatch(tiles.encode(rows), weights, handle).wait()
        values, scales = tiles.decode(tuple(sent))
        wide, wide_weights = dispatcher.dispatch((rows,), weights, handle).wait()
        there = casts.quantize_rows(wide, "ue8m0")
        assert values.shape == (sum(handle.counts), width)
        assert torch.equal(bits(values), bits(there.values)), name
        assert torch.equal(bits(scales), bits(there.scales)), name
        assert scales.stride() == there.scales.stride()
        assert torch.equal(came_weights, wide_weights)
        bad = ~wide.float().isfinite().all(1)
        assert torch.equal(scales.isinf().any(1), bad), "a fault was lost on its way"


@pytest.mark.parametrize(("tokens", "width"), [((7, 0, 5, 4), 256), ((6, 5, 1, 9), 200), ((0, 0, 0, 0), 36)])
def test_what_arrives_is_what_a_cast_there_would_give(tokens: tuple[int, ...], width: int) -> None:
    """On every backend; several nodes, guarded rounds, ranks without tokens, rows that are no whole tiles."""
    run(arrives, len(tokens), tokens, width, deadline=60)


def test_a_row_of_v3_on_the_wire() -> None:
    rows = torch.empty(0, 7168, dtype=torch.bfloat16)
    assert Format.of(codec_of(preset("deepseek_v3")).encode(rows)).bytes == 7168 + 7168 // 128
    for recipe in (preset("deepseek_v3", dispatch="bf16"), preset("bf16"), preset("fp32")):
        assert codec_of(recipe) is AS_IS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # is a prototype, says torch 2.11
@pytest.mark.parametrize("hidden", [7168, 512])
def test_a_gpu_sends_the_same_bits_and_never_waits(hidden: int) -> None:
    rows, tiles = faulty(301, hidden, 0), Tiles()
    sent = tiles.encode(rows)
    given, empty = rows.cuda(), rows[:0].cuda()
    tiles.encode(given)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = tiles.encode(given)
        arrived = tiles.decode(ours)
        assert [len(t) for t in tiles.decode(tiles.encode(empty))] == [0, 0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip((*ours, *arrived), (*sent, *tiles.decode(sent)), strict=True):
        assert torch.equal(bits(a.cpu()), bits(b))
        assert a.stride() == b.stride()


def test_tiles_that_cannot_travel() -> None:
    assert not preset("deepseek_v3", gradient_tile="128x128").fp8_dispatch
    assert preset("deepseek_v3", gradient_tile="128x128").dispatch == "bf16", "a recipe must say what it does"
    with pytest.raises(ValueError, match=r"set fp8\.dispatch = 'bf16'"):
        preset("deepseek_v3", activation_tile="tensor", dispatch="fp8")
    assert preset("deepseek_v3").fp8_dispatch
    assert not Recipe().fp8_dispatch


# -- through the phases of a layer


class Scale(Alone):
    """`Alone`, which writes down what it is given to carry."""

    def __init__(self, experts: int) -> None:
        super().__init__(experts)
        self.log: list[tuple[str, int, tuple[torch.dtype, ...], int]] = []

    def dispatch(self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: Any) -> Any:
        self.log.append(("dispatch", len(rows[0]), tuple(t.dtype for t in rows), Format.of(rows).bytes))
        return super().dispatch(rows, pairs, handle)

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: Any) -> Any:
        self.log.append(("combine", len(rows), (rows.dtype,), Format.of((rows,)).bytes))
        return super().combine(rows, pairs, handle)


def model_of(dispatch: str, **changes: Any) -> tuple[Model, Scale, FP8]:
    """One dense and one MoE layer of hidden 256 in BF16 with FP8 products."""
    shape = tiny(**({"hidden": 256, "expert_ffn": 96, "layers": 2} | changes))
    dispatcher = Scale(shape.routed)
    model, fp8 = in_fp8(shape, dispatcher, dispatch=dispatch)
    return model, dispatcher, fp8


def test_what_a_layer_sends() -> None:
    """Forward and backward: FP8 out, BF16 back, and one row a token goes to the dispatcher, not one a copy."""
    tokens = random_tokens(tiny(), 2, 12)
    model, scale, _ = model_of("fp8")
    train(model, tokens)
    bf16, fp8 = torch.bfloat16, torch.uint8
    out, back = ("dispatch", 24, (fp8, fp8), 256 + 8), ("combine", 24 * 3, (bf16,), 512)
    assert scale.log == [out, back, out, back]
    model, scale, _ = model_of("bf16")
    train(model, tokens)
    assert scale.log == [("dispatch", 24, (bf16,), 512), back] * 2


def test_rows_are_cast_once_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cast at all where they arrive: neither of the experts' input nor of their output's gradient."""
    seen: list[tuple[int, int]] = []
    original = casts.quantize_rows

    def spy(x: Tensor, scales: Any = "fp32") -> Any:
        seen.append((x.shape[0], x.shape[1]))
        return original(x, scales)

    monkeypatch.setattr(casts, "quantize_rows", spy)
    tokens, copies = random_tokens(tiny(), 2, 12), 24 * 3
    for dispatch, arrived in (("fp8", 0), ("bf16", 2)):
        model, _, _ = model_of(dispatch)
        seen.clear()
        train(model, tokens)
        assert seen.count((copies, 256)) == arrived


def layer_of(dispatch: str, experts: int, hidden: int, width: int) -> tuple[Stage, Any]:
    """Layout to combine of a MoE layer by itself."""
    model, _, _ = model_of(dispatch, hidden=hidden, expert_ffn=width, routed=experts, groups=1, group_limit=1)
    phases = [p for p in model.stages[0].phases if p.layer == "layers.1" and p.name != "attention"]
    return Stage(0, phases), model.root["layers"]["1"].experts  # type: ignore[index]


def routed(dispatch: str, tokens: int, hidden: int, chosen: Tensor) -> dict[str, Tensor]:
    """The error of everything that a MoE layer computes, forward and backward, relative to FP64."""
    noise = torch.Generator().manual_seed(3)
    stage, experts = layer_of(dispatch, 4, hidden, 128)
    with torch.no_grad():
        for weight in (experts.gate_up, experts.down):
            weight.copy_(torch.randn(weight.shape, generator=noise) / weight.shape[-1] ** 0.5)
    x, rows, dy = (torch.randn(tokens, hidden, generator=noise).bfloat16() for _ in range(3))
    weights = torch.rand(tokens, chosen.shape[1], generator=noise)
    flight = Flight(torch.empty(0), 1.0)
    state: State = (x, rows, weights, chosen)
    for phase in stage.phases:
        state = phase.forward(state, flight).wait()
    grads: Any = (dy,)
    for phase in reversed(stage.phases):
        result = phase.backward(grads, flight)
        grads = result.value.wait()
        for closure in result.closures:
            closure()
    assert state[0].dtype == grads[1].dtype == torch.bfloat16
    wide = [t.detach().double().requires_grad_() for t in (rows, weights, experts.gate_up, experts.down)]
    y = torch.zeros_like(wide[0])
    for t, k in ((t, k) for t in range(tokens) for k in range(chosen.shape[1])):
        up, down = wide[2][chosen[t, k]], wide[3][chosen[t, k]]
        gate, lift = (wide[0][t] @ up.t()).chunk(2)
        given = functional.silu(gate) * lift * wide[1][t, k] @ down.t()
        y = y.index_add(0, torch.tensor([t]), given[None])
    y.backward(dy.double())
    ours = (state[0] - x.float(), grads[1], grads[2], experts.gate_up.gradient(), experts.down.gradient())
    truth = (y, *(leaf.grad for leaf in wide))
    names = ("y", "rows", "weights", "gate_up", "down")
    return {n: (o.double() - t).norm() / t.norm() for n, o, t in zip(names, ours, truth, strict=True)}  # type: ignore[union-attr]


@pytest.mark.parametrize("hidden", [256, 72])
def test_a_layer_is_as_near_fp64_as_fp8_lets_it_be(hidden: int) -> None:
    """Power-of-two scales waste up to a bit of range, and none of E4M3's precision but in its subnormals; so sending
    in FP8 must cost next to nothing beside casting on arrival."""
    chosen = torch.rand(40, 3, generator=torch.Generator().manual_seed(1)).argsort(dim=1)  # expert 3 gets no row
    sent, arrived = (routed(dispatch, 40, hidden, chosen) for dispatch in ("fp8", "bf16"))
    for name, error in sent.items():
        assert 0.005 < error < 0.09, name
        assert error < 1.15 * arrived[name], name


def test_no_tokens_at_all() -> None:
    stage, experts = layer_of("fp8", 4, 256, 128)
    flight, none = Flight(torch.empty(0), 1.0), torch.empty(0, 256, dtype=torch.bfloat16)
    state: State = (none, none, torch.empty(0, 3), torch.empty(0, 3, dtype=torch.int64))
    (y,) = overlap.play([overlap.forward(stage, flight, state)], CpuStreams(), None)[0]
    grads = overlap.play([overlap.backward(stage, flight, (none,), split=False)], CpuStreams(), None)[0]
    assert y.shape == grads[1].shape == (0, 256)
    assert not experts.gate_up.gradient().any()


def test_bf16_dispatch_gives_experts_autograd_and_bf16_rows() -> None:
    """The path of before: what arrives is BF16, and the experts are `FP8FFN` of it."""
    model, _, fp8 = model_of("bf16")
    assert not any(isinstance(phase, Explicit) for phase in model.stages[0].phases)
    stage, experts = layer_of("bf16", 4, 256, 128)
    rows, weights = torch.randn(9, 256).bfloat16(), torch.rand(9)
    flight = Flight(torch.empty(0), 1.0)
    flight.handles["layers.1"] = Alone(4).plan_routing(torch.tensor([[0]] * 4 + [[2]] * 5)).wait()
    phase = next(phase for phase in stage.phases if phase.name == "experts")
    _, y = phase.forward((rows, rows, weights), flight).wait()
    with torch.no_grad():
        groups = ExpertGroups.of((4, 0, 5, 0), rows)
        assert torch.equal(y, FP8FFN(fp8, experts.gate_up, experts.down, groups)(rows, weights))


def test_a_fault_in_a_row_reaches_its_token_and_the_guard() -> None:
    stage, experts = layer_of("fp8", 4, 256, 128)
    rows = torch.randn(6, 256).bfloat16()
    rows[2, 5] = torch.nan
    flight = Flight(torch.empty(0), 1.0, training=False)
    fp8 = experts.fp8
    fp8.guard.on = True
    state: State = (torch.zeros_like(rows), rows, torch.rand(6, 2) + 0.1, torch.tensor([[0, 1]] * 6))
    for phase in stage.phases:
        state = phase.forward(state, flight).wait()
    assert torch.equal(state[0].float().isnan().any(1), torch.arange(6) == 2)
    counts = {c.name: c for c in fp8.guard.take([("up", experts.gate_up)])}
    assert counts["up: input"].bad == 2, "one tile, in two experts"
    assert counts["up: input"].tiles == 12 * 2


# -- what streams hold, and what metrics see


@dataclass
class Holding(CpuStreams):
    """Keeps what steps have spent, as the streams of a GPU do until they are synchronised."""

    kept: list[object] = field(default_factory=list)

    def step(self, name: StreamName, baton: Baton, run: Run) -> None:
        def holding(value: Grads) -> StepResult:
            result = run(value)
            self.kept.extend(result.spent)
            return result

        super().step(name, baton, holding)


@pytest.mark.parametrize("dispatch", ["fp8", "bf16"])
def test_what_came_with_the_rows_is_held_until_streams_meet(dispatch: str) -> None:
    """Weights are made in the comm stream and read by SwiGLU's backward in the other: freed when that is queued, their
    memory would go to the next message while it runs."""
    model, _, _ = model_of(dispatch)
    stage, flight, streams = model.stages[0], Flight(random_tokens(tiny(), 2, 12), 1.0), Holding()
    experts = next(phase for phase in stage.phases if phase.name == "experts")
    run_forward([stage], [flight])
    saved: Any = flight.saved[experts]
    weights = (saved[1].weights if dispatch == "fp8" else saved[0][1]).data_ptr()
    del saved
    overlap.play([overlap.backward(stage, flight, (), split=True)], streams, None)
    assert weights in {t.data_ptr() for t in tensors(streams.kept)}
    assert not flight.saved


def tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree if isinstance(tree, (list, tuple)) else vars(tree).values() if hasattr(tree, "__dict__") else ()
    return [t for part in parts for t in tensors(part)]


def moved(rank: int, config: Config) -> int:
    mesh = make_mesh(Layout(ep=2), CPU, MINUTE)
    rig = make_rig(make_plan(config), mesh, open_data(config), by_sizes([1, 1]))
    for point in islice(points(config.batch, config.data.seq_len), 1):
        accumulate(rig, point)
    return rig.dispatcher.meter.take()["inter"]


def test_bytes_between_nodes_in_metrics(tiny: Tiny) -> None:
    """Two of four messages a layer halve; the two sums stay BF16."""
    everywhere = ("model.top_k=4", "model.group_limit=2")  # so that no rounding sends a token elsewhere
    base = ('run.out="unused"', "parallel.ep=2", "run.dtype=bf16", "model.hidden=256", "model.layers=2", *everywhere)
    bf16, fp8 = (sum(run(moved, 2, tiny(*base, *more), deadline=60)) for more in ((), ("fp8.preset=deepseek_v3",)))
    crossings = 16 * 32 * 2  # tokens of a step, a routed layer and MTP's
    assert bf16 - fp8 == crossings * 2 * (512 - 256 - 8)
    assert bf16 > crossings * 4 * 512


def test_bytes_of_a_dispatch_in_rounds_are_in_metrics(tiny: Tiny) -> None:
    base = ('run.out="unused"', "parallel.ep=2", "model.layers=2")
    plain, rounds = (sum(run(moved, 2, tiny(*base, *more), deadline=60)) for more in ((), ("comm.imbalance=1.01",)))
    routings = 2 * 8 * 2  # ranks, microbatches of each, a routed layer and MTP's
    loads = routings * 2 * 8  # to the other rank: what each of two ranks is to get
    message = (2 + 1) * 8  # rows for each of its experts, and whether to refuse; once more for each further round
    # Rows are the same bytes in any number of rounds.
    assert rounds - plain > loads
    assert (rounds - plain - loads) % message == 0


def test_a_whole_model_is_no_further_from_bf16_for_it() -> None:
    """All gradients as one vector; 1.1: the same errors drawn anew."""
    shape, tokens = tiny(hidden=256, expert_ffn=96, layers=2), random_tokens(tiny(), 2, 12)
    plain = whole(shape, dtype=torch.bfloat16)
    plain.initialise(0)
    models = {"plain": plain} | {dispatch: in_fp8(shape, dispatch=dispatch)[0] for dispatch in ("fp8", "bf16")}
    for model in models.values():
        train(model, tokens)
    grads = {n: torch.cat([w.gradient().flatten() for _, w in m.named_parameters()]) for n, m in models.items()}
    away = {n: float((grad - grads["plain"]).norm() / grads["plain"].norm()) for n, grad in grads.items()}
    assert 0 < away["fp8"] < 1.1 * away["bf16"]
