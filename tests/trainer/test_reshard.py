"""A checkpoint of any layout goes on in any other: all experts and elements are there, the next steps are the same."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors import safe_open

from dryvine.comm import local
from dryvine.trainer.begin import resume
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.save import Keep, Saver
from dryvine.trainer.config import Config
from dryvine.trainer.ramps import points
from dryvine.trainer.step import train_step
from tests.support.rig import rig_of

Tiny = Callable[..., Config]
LAYOUTS = {
    "alone": (),
    "ep 2": ("parallel.ep=2",),
    "ep 4": ("parallel.ep=4",),
    "dp 2, BF16 moments": ("parallel.dp=2", "optim.moments=bf16"),
    "pp 2, DualPipe": ("parallel.pp=2", "parallel.schedule=dualpipe"),
    "pp 2, DualPipeV": ("parallel.pp=2", "parallel.schedule=dualpipev"),
    "pp 2 ep 2, DualPipe": ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe"),
    "pp 4, 1F1B": ("parallel.pp=4", "parallel.schedule=one_f_one_b"),
}
NAMES = list(LAYOUTS)
# Each layout is read by its neighbours at both distances: 16 pairs.
PAIRS = [(name, NAMES[(i + d) % len(NAMES)]) for i, name in enumerate(NAMES) for d in (1, 3)]
BEFORE, AFTER = 2, 3  # steps


class Gone(NamedTuple):
    """What a rank saw of the steps after a checkpoint."""

    done: int
    losses: list[float]  # of the whole world
    norms: list[float]


def go(rank: int, config: Config, steps: int, save: bool) -> Gone:
    """Go on from the newest checkpoint if there is one."""
    rig = rig_of(config)
    done = resume(rig, _Silent())  # type: ignore[arg-type]
    losses, norms = [], []
    for point in islice(points(config.batch, config.data.seq_len), done, done + steps):
        outcome = train_step(rig, point)
        losses.append(sum(float(loss) for some in outcome.played.losses.values() for loss in some))
        norms.append(outcome.norm)
    if save:
        saver = Saver(config.run.folder, Keep(1), rig.mesh)
        saver.begin(done + steps, rig.state())
        saver.close()
    return Gone(done, losses, norms)


class _Silent:
    def print(self, *given: object, **more: object) -> None:
        pass


def play(config: Config, steps: int, save: bool = False) -> Gone:
    """The losses are means over the sequences of the batch, whatever the layout."""
    ranks = local.run(go, config.parallel.world, config, steps, save, deadline=200)
    microbatches = config.batch.sequences / config.parallel.microbatch_sequences
    totals = [sum(column) / microbatches for column in zip(*(rank.losses for rank in ranks), strict=True)]
    return Gone(ranks[0].done, totals, ranks[0].norms)


def counted(path: Path) -> dict[str, Counter[str]]:
    """Elements by field and parameter, from the headers of the files alone."""
    found: dict[str, Counter[str]] = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            for key in opened.keys():  # noqa: SIM118
                if place := re.fullmatch(r"(.+)@\d+/(master|exp_avg|exp_avg_sq)", key):
                    name, field = place.groups()
                    found.setdefault(field, Counter())[name] += math.prod(opened.get_slice(key).get_shape())
    return found


@pytest.fixture(scope="module")
def saved() -> dict[str, tuple[Path, Gone]]:
    """By layout: its run folder after BEFORE steps, and how it goes on itself."""
    return {}


def of(tiny: Tiny, name: str, folder: str) -> Config:
    return tiny(*LAYOUTS[name], "model.layers=3", f"run.name={folder}", "optim.eps=1e-4")


@pytest.mark.long
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_any_layout_goes_on_in_any_other(
    tiny: Tiny, tmp_path: Path, saved: dict[str, tuple[Path, Gone]], source: str, target: str
) -> None:
    if source not in saved:
        config = of(tiny, source, "source")
        play(config, BEFORE, save=True)
        saved[source] = config.run.folder, play(config, AFTER)
    folder, itself = saved[source]
    config = of(tiny, target, "target")
    config.run.folder.symlink_to(folder)
    moved = play(config, AFTER)
    assert moved.done == itself.done == BEFORE
    tolerance = 1e-6 if LAYOUTS[target][-1:] == LAYOUTS[source][-1:] or "BF16" not in source + target else 1e-3
    assert moved.losses == pytest.approx(itself.losses, rel=tolerance)
    assert moved.norms == pytest.approx(itself.norms, rel=10 * tolerance)


@pytest.mark.long
@pytest.mark.parametrize("source", NAMES)
def test_every_expert_and_element_is_in_the_files(tiny: Tiny, saved: dict[str, tuple[Path, Gone]], source: str) -> None:
    config = of(tiny, source, "source")
    if source not in saved:
        play(config, BEFORE, save=True)
        saved[source] = config.run.folder, play(config, AFTER)
    newest = run_folder.newest(saved[source][0])
    assert newest
    alone = dict(rig_of(of(tiny, "alone", "unused")).model.named_parameters())
    elements = {name: parameter.numel() for name, parameter in alone.items()}
    fields = counted(newest)
    assert fields.keys() == {"master", "exp_avg", "exp_avg_sq"}
    for found in fields.values():
        assert dict(found) == elements
    stacks = [name for name in fields["master"] if ".experts." in name]
    assert len(stacks) == 2 * (2 + 1)  # gate_up and down, of two MoE layers and MTP
    for name in stacks:
        of_one = alone[name].shape[1:].numel()
        assert fields["master"][name] == config.model.routed * of_one
