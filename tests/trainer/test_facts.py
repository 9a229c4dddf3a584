"""What hosts must have in common: every key but the paths of data, the code, the data, what a run goes on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dryvine.trainer.config import Config
from dryvine.trainer.data.splits import open_data
from dryvine.trainer.facts import facts
from dryvine.trainer.run_plan import make_plan


def of(config: Config) -> dict[str, str]:
    return facts(make_plan(config), open_data(config))


def differing(a: dict[str, str], b: dict[str, str]) -> set[str]:
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


def test_a_changed_key_is_one_fact(tiny: Callable[..., Config]) -> None:
    assert differing(of(tiny()), of(tiny("optim.lr=0.5"))) == {"optim.lr"}
    assert differing(of(tiny()), of(tiny("comm.topology.intra=PCIe"))) == {"comm.topology.intra"}


def test_versions_code_and_schedule_are_there(tiny: Callable[..., Config]) -> None:
    found = of(tiny())
    assert found["torch"] == torch.__version__
    assert len(found["code trainer/facts.py"]) == 16
    assert {"code comm/place.py", "code parallel/executor.py", "Python", "CUDA", "numpy", "schedule"} <= found.keys()
    assert "schedule" in differing(of(tiny()), of(tiny("parallel.schedule=zb1p")))


def test_the_same_data_may_lie_elsewhere_and_other_data_may_not(tiny: Callable[..., Config], tmp_path: Path) -> None:
    here = tiny()
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in Path(here.data.source).rglob("*"):
        target = copy / path.relative_to(here.data.source)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            target.parent.mkdir(exist_ok=True, parents=True)
            target.write_bytes(path.read_bytes())
    moved = tiny(f'data.source="{copy}"')
    assert differing(of(here), of(moved)) == set()
    tokens = next((copy / "train").glob("*.bin"))
    changed = bytearray(tokens.read_bytes())
    changed[0] ^= 1
    tokens.write_bytes(changed)
    assert differing(of(here), of(moved)) == {"data"}


def test_a_host_that_does_not_see_the_checkpoints(tiny: Callable[..., Config]) -> None:
    config = tiny()
    before = of(config)
    (config.run.folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert differing(before, of(config)) == {f"newest checkpoint in {config.run.folder}"}
