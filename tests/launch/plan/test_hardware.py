"""Machines by name and from files, and what is said about bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from dryvine.launch.plan.hardware import FOLDER, load_hardware, names
from dryvine.trainer.config import ConfigError


def test_the_machines_of_the_package() -> None:
    assert {"b200", "cpu", "h100", "h200", "h800"} <= set(names())
    for name in names():
        assert load_hardware(name).name == name


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text((FOLDER / "h800.toml").read_text().replace('name = "h800"', 'name = "mine"'))
    assert load_hardware(str(mine)).name == "mine"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("sms = 132", "sms = -1"), "sms: "),
        (("casts", "cats"), "cats: unknown key; did you mean casts"),
        (("comm_sms = 20", "comm_sms = 132"), "toml: comm_sms = 132 leave none of sms = 132"),
        (("memory_gb = 85.0", "memory_gb = 2"), "reserved_gb = 2 leave nothing of memory_gb = 2; lower"),
        (("memory_gb = 85.0", "memory_gb = inf"), "memory_gb: input should be a finite number"),
        (('intra = ["NVLink", 160]', 'intra = ["NVLink", 0]'), "intra: 0 GB/s: write the kind of link and its rate"),
        (('inter = ["InfiniBand", 40]', 'inter = ["InfiniBand", inf]'), "inter.*: input should be a finite number"),
        (("[tflops]", "[tflops"), "cannot be read as TOML"),
    ],
)
def test_a_bad_file_is_refused_in_a_line(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text((FOLDER / "h800.toml").read_text().replace(*change))
    with pytest.raises(ConfigError, match=says) as caught:
        load_hardware(str(mine))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean h100"):
        load_hardware("h10")


def test_nodes_are_filled_one_after_the_other() -> None:
    topology = load_hardware("h800").topology(12)
    assert [len(node) for node in topology.nodes] == [8, 4]
    assert topology.intra.kind == "NVLink"
