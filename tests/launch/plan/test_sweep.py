"""A sweep finds the best layout that planning every one of them finds, and says of each other why it is not."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console

from dryvine.launch.plan import sweep as module
from dryvine.launch.plan.hardware import Machine, load_hardware
from dryvine.launch.plan.page import plan_page
from dryvine.launch.plan.plan import Plan, make
from dryvine.launch.plan.sweep import BEST, sweep
from dryvine.launch.plan.sweep_page import LEGEND, show_sweep, sweep_figures, sweep_page
from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.schedule.table import build
from dryvine.trainer import run_plan
from dryvine.trainer.config import Config
from dryvine.trainer.run_plan import LayoutPlan, make_plan


def machine(megabytes: float) -> Machine:
    return load_hardware("cpu").model_copy(update={"memory_gb": megabytes / 1e3, "reserved_gb": 0.0})


@pytest.fixture
def base(tiny: Callable[..., Config]) -> Config:
    return tiny("parallel.pp=2", "parallel.schedule=dualpipe", "batch.sequences=12")


def test_the_best_is_the_best_of_all(base: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sweep(base, 2, machine(3.0))
    monkeypatch.setattr(module, "BEST", 10**6)  # plan them all
    every = sweep(base, 2, machine(3.0))
    good = [row.seconds for row in found if row.fits]
    assert 0 < len(good) < len(every)
    assert good[:BEST] == [row.seconds for row in every if row.fits][:BEST]
    assert len(found) == len(every)


def test_a_bound_is_below_what_is_simulated_and_near_it(base: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEST", 10**6)  # plan them all
    shares = [row.bound / row.seconds for row in sweep(base, 4, machine(1000.0)) if row.fits]
    assert all(share <= 1 for share in shares)
    assert sum(shares) > 0.6 * len(shares)


def test_what_cannot_be_among_the_best_is_not_simulated(base: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated: list[Plan] = []

    def count(layout: LayoutPlan, of: Machine) -> Plan:
        simulated.append(make(layout, of))
        return simulated[-1]

    monkeypatch.setattr(module, "make", count)
    rows = sweep(base, 4, machine(1000.0))
    slower = [row for row in rows if row.reason.startswith("slower")]
    assert len(simulated) >= BEST
    assert len(slower) > 20
    assert max(row.seconds for row in rows[:BEST]) <= min(row.bound for row in slower)


def test_every_other_layout_has_its_reason(base: Config) -> None:
    rows = sweep(base, 2, machine(2.5))
    assert all(row.fits != bool(row.reason) for row in rows)
    reasons = " ".join(row.reason for row in rows)
    assert all(word in reasons for word in ("does not fit", "needs pp", "no whole number of"))
    for row in rows:
        if row.peak:
            assert row.reason.startswith("does not fit") == (row.peak > 2.5e6)


def test_where_nothing_fits_the_nearest_are_shown(base: Config) -> None:
    out = StringIO()
    rows = sweep(base, 2, machine(0.1))
    show_sweep(rows, Console(file=out, width=160))
    assert "none fits; those that come nearest, of" in out.getvalue()
    least = min(row.least for row in rows if row.least)
    assert not any(row.peak for row in rows), "not even the state fits, so nothing else was counted"
    assert f"alone {least / 1e9:.0f} GB" in out.getvalue()


def test_where_nothing_is_legal_that_is_said(base: Config) -> None:
    out = StringIO()
    show_sweep(sweep(base, 1009, machine(1000.0)), Console(file=out, width=160))
    assert "none is legal, of" in out.getvalue()
    assert "no whole number of" in out.getvalue()


def test_offload_is_tried_where_a_layout_does_not_fit_without(base: Config) -> None:
    gpu = load_hardware("h100").model_copy(update={"reserved_gb": 0.0})
    roomy = sweep(base, 2, gpu)
    assert not any(row.candidate.offload for row in roomy)
    least = min(row.peak for row in roomy if row.peak)
    rows = sweep(base, 2, gpu.model_copy(update={"memory_gb": (least - 1) / 1e9}))
    good = [row for row in rows if row.fits]
    assert good
    assert all(row.candidate.offload for row in good)
    assert len(rows) == len(roomy)
    plan = good[0].plan
    assert plan is not None
    assert plan.config.optim.offload == "cpu"
    out = StringIO()
    show_sweep(rows, Console(file=out, width=160))
    assert " o " in out.getvalue()
    assert [row["offload"] for row in sweep_figures(rows)][: len(good)] == [True] * len(good)


def test_what_fits_but_for_the_buffer_of_checkpoints_is_out(base: Config) -> None:
    host = load_hardware("cpu").host.model_copy(update={"memory_gb": 1e-6})
    rows = sweep(base, 2, machine(1000.0).model_copy(update={"host": host}))
    assert not any(row.fits for row in rows)
    assert any("of host memory" in row.reason for row in rows)


def test_nodes_of_the_config_are_those_of_its_own_layout(base: Config) -> None:
    given = base.comm.model_copy(update={"topology": base.comm.topology.model_copy(update={"nodes": (1, 1)})})
    named = base.model_copy(update={"comm": given})
    assert [row.seconds for row in sweep(named, 4, machine(1000.0))] == [
        row.seconds for row in sweep(base, 4, machine(1000.0))
    ]


def test_pages_and_figures(base: Config) -> None:
    rows = sweep(base, 2, machine(3.0))
    text = sweep_page(rows, "tiny", 2, machine(3.0))
    assert text.count("<svg") == 2
    assert "Why not the others" in text
    assert LEGEND in text
    assert "http" not in text.replace("http://www.w3.org", ""), "nothing is fetched"
    assert [row["fits"] for row in sweep_figures(rows)] == [row.fits for row in rows]
    plan = plan_page(make(make_plan(base), machine(30.0)))
    assert plan.count("<svg") == 2
    assert "DOES NOT FIT" not in plan


def test_layouts_that_share_a_schedule_have_it_built_once(base: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[str, int, int, int]] = []

    def count(name: str, pp: int, microbatches: int, chunks: int) -> Schedule:
        built.append((name, pp, microbatches, chunks))
        return build(name, pp, microbatches, chunks)

    monkeypatch.setattr(run_plan, "build", count)
    rows = sweep(base, 4, machine(1000.0))
    planned = [row for row in rows if row.plan]
    assert len(built) == len(set(built)) < len(planned)
    for row in planned:
        assert row.plan is not None
        alone = make(make_plan(row.candidate.config(base)), machine(1000.0))
        assert (alone.step_seconds, alone.fullest.total) == (row.seconds, row.peak)


def test_what_does_not_fit_is_not_simulated(base: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: object) -> Plan:
        raise AssertionError("simulated")

    monkeypatch.setattr(module, "BEST", 10**6)  # plan them all
    least = min(row.peak for row in sweep(base, 2, machine(1000.0)) if row.peak)
    monkeypatch.setattr(module, "make", refuse)
    rows = sweep(base, 2, machine((least - 1) / 1e6))
    assert rows
    assert not any(row.fits for row in rows)
    assert any(row.peak for row in rows)
