"""Engines of other packages against stand-ins for the packages, and the choice that all ranks share."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dryvine.comm import local
from dryvine.comm.mesh import Layout, Mesh, make_mesh
from dryvine.trainer.fp8 import casts
from dryvine.trainer.fp8.choose import CHOICE_FILE, agree_on_engines, choose_engines
from dryvine.trainer.fp8.engines import deep_gemm as deep_gemm_engine
from dryvine.trainer.fp8.engines import operands
from dryvine.trainer.fp8.engines import transformer_engine as te_engine
from dryvine.trainer.fp8.engines.deep_gemm import DeepGemm
from dryvine.trainer.fp8.engines.emulate import Emulate
from dryvine.trainer.fp8.engines.mixed import KINDS, Mixed
from dryvine.trainer.fp8.engines.names import make_engine
from dryvine.trainer.fp8.engines.protocol import Engine
from dryvine.trainer.fp8.engines.transformer_engine import TransformerEngine
from dryvine.trainer.fp8.recipe import preset
from dryvine.trainer.fp8.trial import Times, fault
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized
from tests.support.fp8_engines import install

CPU = torch.device("cpu")
ADAPTERS: dict[str, Engine] = {"deep_gemm": DeepGemm(), "transformer_engine": TransformerEngine()}
GROUPS = [(100, 0, 28, 129), (1, 7), (0, 128), (256,), (0, 0)]


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    install(monkeypatch)
    return ADAPTERS[request.param]


def normal(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def close(ours: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype
    bound = 8e-3 if dtype == torch.bfloat16 else 1e-5  # one BF16 rounding of each; order of FP32 additions
    torch.testing.assert_close(ours.float(), truth.float(), rtol=bound, atol=bound * 30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), [(70, 112, 144), (256, 384, 640), (3, 128, 128), (0, 128, 128)])
def test_dense_products_are_those_of_emulation(adapter: Engine, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    a, b = casts.quantize_rows(normal(m, k)), casts.quantize_blocks(normal(n, k))[0]
    close(adapter.product(a, b, None, dtype), Emulate().product(a, b, None, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("counts", GROUPS, ids=str)
def test_grouped_products_are_those_of_emulation(adapter: Engine, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    groups = ExpertGroups(counts, CPU)
    a = casts.quantize_rows(normal(groups.rows, 272))
    b = casts.quantize_blocks(normal(len(counts), 112, 272))[0]
    close(adapter.product(a, b, groups, dtype), Emulate().product(a, b, groups, dtype), dtype)


@pytest.mark.parametrize("counts", [counts for counts in GROUPS if any(counts)], ids=str)
def test_weight_gradients_add_to_what_there_is(adapter: Engine, counts: tuple[int, ...]) -> None:
    groups = ExpertGroups(counts, CPU)
    a, b = (casts.quantize_columns(normal(groups.rows, width), groups) for width in (112, 144))
    ours, truth = (normal(len(counts), 112, 144) for _ in range(2))
    adapter.wgrad(a, b, groups, ours)
    Emulate().wgrad(a, b, groups, truth)
    close(ours, truth, torch.float32)
    empty = [expert for expert, count in enumerate(counts) if not count]
    assert torch.equal(ours[empty], normal(len(counts), 112, 144)[empty])


def test_a_slice_that_looks_aligned_by_chance_is_copied() -> None:
    """Rows 1 to 8 of 8: strides are those of an aligned tensor, the address is not."""
    part = casts.quantize_rows(normal(8, 256)).scales[1:]
    assert part.stride() == (1, 8)
    copy = operands.aligned(part)
    assert copy.data_ptr() % 16 == 0
    assert torch.equal(copy, part)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("width", [128, 256])
def test_scales_of_some_rows_have_the_strides_that_cublas_asks_for(rows: int, width: int) -> None:
    """A single column too, whose stride torch thinks does not matter."""
    part = casts.quantize_rows(normal(40, width)).scales[8 : 8 + rows]
    whole = operands.token_major(part)
    assert whole.stride() == (1, rows)
    assert torch.equal(whole, part)


def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (deep_gemm_engine, te_engine):
        monkeypatch.setattr(module, "no_hopper", lambda device: None)


@pytest.mark.parametrize("name", ADAPTERS)
def test_on_hopper_a_package_that_is_not_there_is_named_with_the_fix(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_hopper(monkeypatch)
    reason = make_engine(name).missing(CPU)
    assert reason is not None
    assert reason.startswith("is not installed: ")
    assert "install" in reason.removeprefix("is not installed: ")
    assert "fp8.gemm = '" in reason


def test_an_old_or_broken_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(monkeypatch)
    install(monkeypatch)
    import deep_gemm

    assert DeepGemm.missing(CPU) is None
    monkeypatch.delattr(deep_gemm, "k_grouped_fp8_gemm_nt_contiguous")
    assert "without weight gradients on Hopper" in str(DeepGemm.missing(CPU))
    reasons = {"2.19.0": "is 2.19.0, and needs to be 2.20 or later", "2.20.2": None, "3.0.0+cu13": None}
    for version, line in reasons.items():
        monkeypatch.setattr(te_engine, "version", lambda _, version=version: version)
        reason = TransformerEngine.missing(CPU)
        assert reason == line if line is None else line in str(reason)


@pytest.mark.parametrize(
    ("name", "module"), [("deep_gemm", "deep_gemm"), ("transformer_engine", "transformer_engine.pytorch")]
)
def test_a_package_that_warns_when_imported_can_be_used(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer Engine warns of a JAX that it thinks is too old; warnings are errors in tests, and under -W error."""
    on_hopper(monkeypatch)
    monkeypatch.setattr(te_engine, "version", lambda _: "2.20.2")
    content = "import warnings\nwarnings.warn('an old JAX', RuntimeWarning)\nk_grouped_fp8_gemm_nt_contiguous = None\n"
    package = tmp_path.joinpath(*module.split("."))
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(content)
    for loaded in (module, module.partition(".")[0]):
        monkeypatch.delitem(sys.modules, loaded, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert ADAPTERS[name].missing(CPU) is None


class Off(Emulate):
    """Multiplies by 1.02 too much."""

    def product(self, a: Quantized, b: Quantized, groups: ExpertGroups | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:  # fmt: skip # noqa: E501
        return super().product(a, b, groups, dtype) * 1.02


class Forgets(Emulate):
    def wgrad(self, a: Quantized, b: Quantized, groups: ExpertGroups, total: Tensor) -> None:
        total.zero_()
        super().wgrad(a, b, groups, total)


class Raises(Emulate):
    def wgrad(self, a: Quantized, b: Quantized, groups: ExpertGroups, total: Tensor) -> None:
        raise RuntimeError("no kernel\nfor this")


def test_auto_leaves_out_an_engine_that_multiplies_wrongly(adapter: Engine) -> None:
    assert fault(adapter, CPU) is None
    assert fault(Off(), CPU) == "its dense products are 2.0% off"
    assert "weight gradients" in str(fault(Forgets(), CPU))
    assert fault(Raises(), CPU) == "RuntimeError: no kernel"


class NotANumber(Emulate):
    def single(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        return super().single(a, b, dtype) * torch.nan


class Barely(Emulate):
    """Off by less than a percent, as an engine is that adds in another order."""

    def single(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        return super().single(a, b, dtype) * 1.005


def test_a_hundredth_is_the_line_and_a_nan_is_beyond_it() -> None:
    assert fault(Barely(), CPU) is None
    assert fault(NotANumber(), CPU) == "its dense products are nan% off"


def test_each_kind_of_product_goes_to_its_engine() -> None:
    class Named(Emulate):
        def __init__(self, name: str) -> None:
            object.__setattr__(self, "name", name)

        def product(self, *operands: object) -> Any:
            return self.name  # type: ignore[attr-defined]

        def wgrad(self, *operands: object) -> None:
            raise RuntimeError(self.name)  # type: ignore[attr-defined]

    groups = ExpertGroups((4,), CPU)
    a, b = casts.quantize_rows(normal(4, 128)), casts.quantize_blocks(normal(128, 128))[0]
    mixed = Mixed(*map(Named, KINDS))
    assert mixed.product(a, b) == "dense products"
    assert mixed.product(a, b, groups) == "grouped products"
    with pytest.raises(RuntimeError, match="weight gradients"):
        mixed.wgrad(a, b, groups, torch.zeros(1))


# ---- one choice for all ranks


def alone(rank: int = 0) -> Mesh:
    return make_mesh(Layout(), CPU, timedelta(seconds=60))


def timings(*rows: tuple[float, ...]) -> Times:
    return {kind: dict(zip("ab", row, strict=True)) for kind, row in zip(KINDS, rows, strict=True)}


# Alone, rank 0 would take a, a, b and rank 1 b, b, b. The slowest rank's times: a (3, 2), b (2, 9), b (1, 1).
RANKS = [timings((1.0, 2.0), (1.0, 9.0), (5.0, 1.0)), timings((3.0, 1.0), (2.0, 1.5), (3.0, 1.0))]
SHARED = dict(zip(KINDS, "bab", strict=True))


def _rank(rank: int, folder: Path, able: tuple[str, ...]) -> list[tuple[dict[str, str], str]]:
    mesh, asked = make_mesh(Layout(ep=2), CPU, timedelta(seconds=60)), []

    def measure(engines: Mapping[str, Engine], device: torch.device) -> Times:
        asked.append(tuple(engines))
        return {kind: {name: row[name] for name in engines} for kind, row in RANKS[rank].items()}

    engines = {name: Emulate() for name in (able if rank == 1 else ("a", "b"))}
    twice = [agree_on_engines(engines, mesh, folder / f"of rank {rank}", measure) for _ in range(2)]
    assert len(asked) == 1, "measured again although the folder has the choice"
    return twice


def test_ranks_that_measure_differently_take_the_same_engines_and_keep_them(tmp_path: Path) -> None:
    first, second = local.run(_rank, 2, tmp_path, ("a", "b"), deadline=60)
    assert [taken for taken, _ in first] == [taken for taken, _ in second] == [SHARED, SHARED]
    assert "dense products b (a 3.00 ms, b 2.00 ms)" in first[0][1]
    assert CHOICE_FILE in first[1][1]
    assert json.loads((tmp_path / "of rank 0" / CHOICE_FILE).read_text()) == SHARED
    assert not (tmp_path / "of rank 1").exists()


def test_an_engine_that_one_rank_lacks_is_taken_by_none(tmp_path: Path) -> None:
    for taken, line in (results[0] for results in local.run(_rank, 2, tmp_path, ("b",), deadline=60)):
        assert set(taken.values()) == {"b"}
        assert "not on every rank: a" in line


def test_a_stored_engine_that_is_gone_is_chosen_anew(tmp_path: Path) -> None:
    (tmp_path / CHOICE_FILE).write_text(json.dumps(dict.fromkeys(KINDS, "gone")))
    taken, _ = agree_on_engines({"a": Emulate(), "b": Emulate()}, alone(), tmp_path, lambda *_: RANKS[0])
    assert taken == dict(zip(KINDS, "aab", strict=True))
    assert json.loads((tmp_path / CHOICE_FILE).read_text()) == taken


def test_on_a_cpu_auto_emulates_and_writes_nothing(tmp_path: Path) -> None:
    engine, line = choose_engines(preset("deepseek_v3", accumulator="hopper"), alone(), tmp_path / "run")
    assert isinstance(engine, Emulate)
    assert engine.accumulator == "hopper"
    assert "emulate, the one there is on cpu" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("gemm", ["auto", "emulate"])
def test_emulation_is_the_recipes(gemm: str, tmp_path: Path) -> None:
    recipe = preset("deepseek_v3", accumulator="hopper", promotion=256, gemm=gemm)
    assert choose_engines(recipe, alone(), tmp_path)[0] == Emulate("hopper", 256)


def test_a_choice_that_lacks_a_kind_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / CHOICE_FILE).write_text(json.dumps({KINDS[0]: "b", KINDS[1]: "b"}))
    taken, _ = agree_on_engines({"a": Emulate(), "b": Emulate()}, alone(), tmp_path, lambda *_: RANKS[0])
    assert taken == dict(zip(KINDS, "aab", strict=True))
