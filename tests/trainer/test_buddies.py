"""State in the memory of two nodes: what a start takes when a node, a file or a byte of it is gone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from dryvine.comm import buddies, local
from dryvine.comm.buddies import make_links
from dryvine.comm.topology import buddy_of, by_sizes
from dryvine.trainer import journal, loop
from dryvine.trainer.checkpoint import attempts, memory_saver, run_folder
from dryvine.trainer.checkpoint.attempts import check_folder
from dryvine.trainer.checkpoint.memory_load import Recalled, recall
from dryvine.trainer.checkpoint.memory_saver import MemorySaver
from dryvine.trainer.config import Config, ConfigError, RunConfig
from dryvine.trainer.data.identity import DataIdentity
from dryvine.trainer.loop import train
from dryvine.trainer.nonfinite import Diverged
from dryvine.trainer.rig import mesh_of
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.sources import open_sources
from tests.support.checkpoints import mesh, save, state

TOPOLOGY = by_sizes([2, 2])
IDENTITY = DataIdentity("d", "t")


def run_of(out: Path, rank: int) -> RunConfig:
    """Each node's memory is a folder of its own."""
    memory = out / f"host-{TOPOLOGY.node_of(rank)}"
    memory.mkdir(exist_ok=True)
    return RunConfig(name="run", steps=9, out=str(out), buddy_every=1, buddy_folder=str(memory))


def held(rank: int, value: float, size: int = 5) -> Any:
    piece = {"master": torch.full((size,), value + rank), "step": torch.tensor(value)}
    return state({("w", size * rank): piece}, {"bias": torch.full((2,), value)}, w=(4 * size,))


def _live(rank: int, out: Path, steps: tuple[int, ...], named: tuple[int, ...] = (0, 1, 2, 3)) -> None:
    """Keep some steps in memory, and die; of the last, only some ranks have come to name their copies."""
    buddies.CHUNK = 1 << 7  # several messages a file
    links = make_links(TOPOLOGY, rank, timedelta(seconds=60))
    saver = MemorySaver(run_of(out, rank), mesh(4), TOPOLOGY.node_of(rank), links, IDENTITY)
    for step in steps:
        assert saver.begin(step, held(rank, step)) == ""
    assert saver._writing
    saver._writing.result()
    if len(named) == 4:
        assert saver.finish() == ""
    elif rank in named:
        for home in saver._homes.values():
            run_folder.publish_step(home, steps[-1])


def _recall(rank: int, out: Path, size: int = 5, identity: DataIdentity = IDENTITY) -> tuple[Recalled, float, float]:
    live = held(rank, 0.0, size)
    found = recall(run_of(out, rank), mesh(4), TOPOLOGY.node_of(rank), identity, live)
    return found, float(live.pieces["w", size * rank]["master"].mean()) - rank, float(live.buffers["bias"].mean())


def recalled(out: Path, *more: Any) -> Recalled:
    """All ranks must have the state of the step that they say."""
    every = local.run(_recall, 4, out, *more, deadline=60)
    found = every[0][0]
    assert all(one == (found, found.step or 0, found.step or 0) for one in every)
    return found


def copies(out: Path, rank: int) -> list[Path]:
    """Of a rank's state, on its own node and then on its buddy's."""
    found = out.glob(f"host-*/dryvine-*/node-*/rank-{rank:05d}/checkpoints/step-*")
    return sorted(found, key=lambda path: f"node-{TOPOLOGY.node_of(rank)}" not in str(path))


def flip(path: Path) -> None:
    content = bytearray((file := next(path.glob("*.safetensors"))).read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """After an attempt that kept step 7."""
    local.run(_live, 4, tmp_path, (5, 7), deadline=60)
    return tmp_path


def test_a_buddy_is_on_another_node_and_has_one_client_where_nodes_are_even() -> None:
    three = by_sizes([2, 2, 2])
    assert [buddy_of(three, rank) for rank in range(6)] == [2, 3, 4, 5, 0, 1]
    uneven = by_sizes([3, 1])
    assert [buddy_of(uneven, rank) for rank in range(4)] == [3, 3, 3, 0]


def test_each_rank_is_in_its_nodes_memory_and_in_anothers_once(out: Path) -> None:
    for rank in range(4):
        paths = copies(out, rank)
        assert [path.name for path in paths] == ["step-00000007"] * 2
        assert len({path.relative_to(out).parts[0] for path in paths}) == 2
        contents = [[file.read_bytes() for file in attempts.files(path, rank)] for path in paths]
        assert contents[0] == contents[1]


def test_a_process_that_dies_needs_no_storage_and_a_lost_node_none_either(out: Path) -> None:
    assert recalled(out) == Recalled(7, 0, [])
    shutil.rmtree(out / "host-1")
    assert recalled(out) == Recalled(7, 2, [])
    assert recalled(out) == Recalled(7, 0, []), "what was sent is kept"


def test_both_nodes_lost_is_for_storage(out: Path) -> None:
    for host in (0, 1):
        shutil.rmtree(out / f"host-{host}")
    assert recalled(out) == Recalled(None, 0, [])


def test_what_is_damaged_is_taken_from_the_other_node_with_the_file_named(out: Path) -> None:
    own, other = copies(out, 3)
    flip(own)
    found = recalled(out)
    assert (found.step, found.sent) == (7, 1)
    assert f"rank 3's of step 7: {own}/rank-00003.safetensors: damaged: w@15/step is not as" in found.passed_over[0]
    flip(own := copies(out, 3)[0])
    flip(other)
    found = recalled(out)
    assert (found.step, len(found.passed_over)) == (None, 2)
    (own / "manifest.json").write_text("{")
    other.joinpath("manifest.json").unlink()
    assert recalled(out).step is None


def test_storage_is_read_where_it_is_newer(out: Path) -> None:
    whole = {("w", 0): {"master": torch.zeros(20), "step": torch.tensor(0.0)}}
    for step, taken in ((7, 7), (8, None)):
        save(out / "run", step, state(whole))
        assert recalled(out).step == taken


def test_other_layouts_other_data_and_other_runs_are_not_taken(out: Path) -> None:
    assert "of another layout" in recalled(out, 6).passed_over[0]
    assert "of other data" in recalled(out, 5, DataIdentity("d", "u")).passed_over[0]
    assert recalled(out).step == 7
    (out / "run" / "attempts.txt").unlink()  # the run's folder was deleted
    assert recalled(out) == Recalled(None, 0, [])


def test_a_folder_that_a_host_does_not_have_is_refused_and_others_cannot_read_one(out: Path) -> None:
    assert all(folder.stat().st_mode & 0o77 == 0 for folder in out.glob("host-*/dryvine-*"))
    run = run_of(out, 0)
    check_folder(run)
    check_folder(run.model_copy(update={"buddy_folder": "/nowhere", "buddy_every": None}))
    with pytest.raises(ConfigError, match=r"run\.buddy_folder = '/nowhere' is not a writable folder"):
        check_folder(run.model_copy(update={"buddy_folder": "/nowhere"}))


@pytest.mark.parametrize(("named", "step"), [((0,), 5), ((), 5), ((0, 1), 7), ((1, 2, 3), 7)])
def test_a_kill_while_copies_get_their_names_leaves_a_whole_step(
    tmp_path: Path, named: tuple[int, ...], step: int
) -> None:
    """Ranks 0 and 1 are on a node: what they have named holds all ranks' copies."""
    local.run(_live, 4, tmp_path, (5, 7), named, deadline=60)
    assert recalled(tmp_path).step == step


def test_steps_of_two_attempts_do_not_mix(tmp_path: Path) -> None:
    """The second attempt dies before it has all of its first copy; the first one's are still there."""
    local.run(_live, 4, tmp_path, (5, 7), deadline=60)
    local.run(_live, 4, tmp_path, (7,), (0,), deadline=60)
    for host in ("host-0", "host-1"):
        assert len(list((tmp_path / host).iterdir())) == 2
    for path in copies(tmp_path, 2):
        if "7" in path.name:
            shutil.rmtree(path)
    assert recalled(tmp_path).step is None
    local.run(_live, 4, tmp_path, (8, 9), deadline=60)
    assert [len(list((tmp_path / host).iterdir())) for host in ("host-0", "host-1")] == [1, 1], "old attempts are freed"


def _troubled(rank: int, out: Path, trouble: str) -> tuple[str, str, int]:
    """What is said of a copy that cannot be, of the next that can, and how many messages are left over."""
    links = make_links(TOPOLOGY, rank, timedelta(seconds=60))
    saver = MemorySaver(run_of(out, rank), mesh(4), TOPOLOGY.node_of(rank), links, IDENTITY)
    real, said = memory_saver.allocate, ""

    def full(path: Path, size: int) -> None:
        raise OSError(28, "No space left on device")

    if rank == 2 and trouble == "room":
        memory_saver.allocate = full
    bad = held(rank, float("nan") if rank == 2 and trouble == "nan" else 3.0)
    saver.begin(3, bad)
    try:
        said = saver.finish()
    except Diverged as error:
        said = str(error)
    memory_saver.allocate = real
    saver.begin(4, held(rank, 4.0))
    return said, saver.finish(), len(list(out.glob("host-*/*/*/*/checkpoints/*.part")))


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("room", "no copy of step 3 in memory: .*rank-00000/checkpoints/step-00000003.part: No space left on device"),
        ("nan", r"step 3 is not saved, since it holds what is not finite: rank 2: w \(master\)"),
    ],
)
def test_a_copy_that_cannot_be_is_said_and_the_next_is_made(tmp_path: Path, trouble: str, message: str) -> None:
    for said, after, left in local.run(_troubled, 4, tmp_path, trouble, deadline=60):
        assert re.match(message, said), said
        assert (after, left) == ("", 0)


LAYOUT = ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", "batch.sequences=8", "model.layers=3")


def _train(rank: int, config: Config, out: Path, dies_after: int) -> None:
    """A run on two nodes, whose ranks all die in a step."""
    real = loop.train_step

    def step(rig: Any, point: Any) -> Any:
        if point.step == dies_after:
            raise RuntimeError("the machine is gone")
        return real(rig, point)

    loop.train_step = step
    run = config.run.model_copy(update={"buddy_folder": run_of(out, rank).buddy_folder})
    plan = make_plan(config.model_copy(update={"run": run}))
    train(plan, mesh_of(plan, torch.device("cpu")), open_sources(config), TOPOLOGY)


def test_a_run_whose_node_is_lost_goes_on_without_storage_to_the_same_bits(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """And leaves no copy in memory once it has ended."""
    run = ("run.steps=6", "run.eval_every=100", "run.checkpoint_every=100")
    calm = tiny(*LAYOUT, *run, "run.name=calm")
    local.run(_train, 4, calm, tmp_path, 99, deadline=100)
    killed = tiny(*LAYOUT, *run, "run.name=killed", "run.buddy_every=2")
    with pytest.raises(local.RankFailed, match="the machine is gone"):
        local.run(_train, 4, killed, tmp_path, 5, deadline=100)
    assert run_folder.newest(killed.run.folder) is None
    shutil.rmtree(tmp_path / "host-1")
    local.run(_train, 4, killed, tmp_path, 99, deadline=100)
    rows = [journal.read(config.run.folder) for config in (calm, killed)]
    for figure in ("step", "loss", "grad_norm"):
        assert [row[figure] for row in rows[0]] == [row[figure] for row in rows[1]]
    # Of step 4, if all ranks had their copies when the machine went; else of the one before.
    starts = [json.loads(line)["after_step"] for line in (killed.run.folder / "starts.jsonl").read_text().splitlines()]
    assert starts in ([0, 4], [0, 2])
    assert not list(tmp_path.glob("host-*/dryvine-*"))
    assert attempts.listed(killed.run) == []
