"""Checkpoints by themselves: what is stored and kept, who waits for whom, what another cut or model reads."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dryvine.comm import local
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.load import Loaded, load, newest_sound
from dryvine.trainer.checkpoint.manifest import CheckpointError
from dryvine.trainer.checkpoint.reader import open_checkpoint, whole
from dryvine.trainer.checkpoint.save import Keep, Saver
from dryvine.trainer.data.identity import DataIdentity
from dryvine.trainer.nonfinite import Diverged
from tests.support.checkpoints import empty, mesh, old, old_state, piece, save, state

DELAY = 0.5


def _late(rank: int, folder: Path) -> tuple[bool, bool]:
    """A save in which rank 1 writes late. Whether the checkpoint had its name before, and whether it has it after."""
    saver = Saver(folder, Keep(1), mesh(2))
    write = saver._write

    def slowly(*given: Any) -> Any:
        time.sleep(DELAY * rank)
        early.append(run_folder.newest(folder) is not None)
        return write(*given)

    early: list[bool] = []
    saver._write = slowly  # type: ignore[method-assign]
    saver.begin(3, state({("w", 4 * rank): piece(4.0 * rank, 4)}, w=(8,)))
    path = saver.finish()
    return early[0], path is not None and path.exists()


def test_a_checkpoint_has_its_name_when_the_last_rank_has_written(tmp_path: Path) -> None:
    assert local.run(_late, 2, tmp_path, deadline=100) == [(False, True)] * 2
    assert whole(open_checkpoint(tmp_path), "w").tolist() == [float(i) for i in range(8)]


def test_the_step_goes_on_while_the_copy_is_written(tmp_path: Path) -> None:
    """What is stored is the state at `begin`, though the live tensors change while a slow disk is written to."""
    saver = Saver(tmp_path, Keep(2), mesh())
    write = saver._write

    def slowly(*given: Any) -> Any:
        time.sleep(DELAY)
        return write(*given)

    saver._write = slowly  # type: ignore[method-assign]
    live = {("w", 0): piece(0.0, 4)}
    saver.begin(1, state(live))
    live["w", 0]["master"].fill_(9)
    assert saver.pending
    assert saver.busy
    assert run_folder.newest(tmp_path) is None
    saver.begin(2, state(live))  # waits for the one before
    saver.close()
    stored = [whole(open_checkpoint(path), "w").tolist() for path in run_folder.complete(tmp_path)]
    assert stored == [[0.0, 1.0, 2.0, 3.0], [9.0] * 4]
    assert not saver.pending


def test_pieces_cut_elsewhere_get_their_own_elements(tmp_path: Path) -> None:
    """Stored as 0-3, 4-9; loaded as 0-1, 2-6, 7-9, and then as one; moments in another precision."""
    stored = {("w", 0): piece(0.0, 4), ("w", 4): piece(4.0, 6)}
    path = save(tmp_path, 9, state(stored, {"bias": torch.tensor([1.0, 2.0])}))
    for cuts in ([(0, 2), (2, 5), (7, 3)], [(0, 10)], [(0, 4), (4, 6)]):
        live = {("w", start): empty(size, torch.bfloat16) for start, size in cuts}
        bias = torch.zeros(2)
        assert load(open_checkpoint(path), state(live, {"bias": bias}), mesh()) == Loaded(9, frozenset())
        assert bias.tolist() == [1.0, 2.0]
        for (_, start), fields in live.items():
            wanted = [float(i) for i in range(start, start + len(fields["master"]))]
            assert fields["master"].tolist() == wanted
            assert fields["exp_avg"].tolist() == [-value for value in wanted]
            assert float(fields["step"]) == 5


def test_optional_fields_may_be_missing_and_others_may_not(tmp_path: Path) -> None:
    path = save(tmp_path, 1, state({("w", 0): piece(0.0, 4)}))
    live = {("w", 0): empty(4) | {"ema": torch.full((4,), 7.0)}}
    loaded = load(open_checkpoint(path), state(live), mesh(), optional=("ema", "exp_avg"))
    assert loaded.missing == {"ema"}
    assert live["w", 0]["ema"].tolist() == [7.0] * 4
    assert live["w", 0]["exp_avg"].tolist() == [-0.0, -1.0, -2.0, -3.0]
    with pytest.raises(CheckpointError, match="does not hold w, elements 0 to 4, ema"):
        load(open_checkpoint(path), state(live), mesh())


def test_an_optional_field_that_is_stored_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1, state({("w", 0): piece(0.0, 4) | {"ema": torch.ones(4)}}))
    live = {("w", 0): empty(4) | {"ema": torch.zeros(4)}}
    assert not load(open_checkpoint(path), state(live), mesh(), optional=("ema",)).missing
    assert live["w", 0]["ema"].tolist() == [1.0] * 4
    load(open_checkpoint(path), state({("w", 0): empty(4)}), mesh(), optional=("ema",))  # a run without an average


@pytest.mark.parametrize(
    ("stored", "here", "said"),
    [
        ({"w": (2, 4)}, {"w": (4, 2)}, r"w is of \[2, 4\] there and \[4, 2\] here"),
        ({"w": (8,)}, {"v": (8,)}, "does not hold v"),
        ({"w": (8,), "v": (8,)}, {"w": (8,)}, "holds v, which this model has not"),
        ({"w": (8,)}, {"w": (4,)}, r"w is of \[8\] there and \[4\] here"),
    ],
)
def test_another_model_is_refused_with_the_tensor_named(
    tmp_path: Path, stored: dict[str, tuple[int, ...]], here: dict[str, tuple[int, ...]], said: str
) -> None:
    path = save(tmp_path, 1, state({(name, 0): piece(1.0, 8) for name in stored}, **stored))
    live = {(name, 0): empty(shape[0] if len(shape) == 1 else 8) for name, shape in here.items()}
    with pytest.raises(CheckpointError, match=f"{said}; the checkpoint is of another model; set run.name"):
        load(open_checkpoint(path), state(live, **here), mesh())
    assert all(not fields["master"].any() for fields in live.values())


def test_only_what_a_save_has_named_counts_and_old_ones_go(tmp_path: Path) -> None:
    assert run_folder.newest(tmp_path) is None
    home = tmp_path / "checkpoints"
    stray = ("step-00000012.bak", "step-00000099 (copy)", "step-13", "step-000000014", "notes", "step-00000050.damaged")
    for name in (*stray, "step-00000012.part", "step-00000007.old"):
        (home / name).mkdir(parents=True)
    (home / "step-00000098").write_text("no folder")
    for step in (8, 9, 10, 11):
        save(tmp_path, step, state({("w", 0): piece(step, 4)}))
    assert run_folder.newest(tmp_path) == home / "step-00000011"
    assert (home / "latest").resolve() == (home / "step-00000011").resolve()
    kept = {path.name for path in home.iterdir()}
    assert kept == {"step-00000010", "step-00000011", "step-00000098", "latest", *stray}


def test_every_mth_stays_for_ever(tmp_path: Path) -> None:
    for step in range(1, 9):
        save(tmp_path, step, state({("w", 0): piece(step, 4)}), Keep(1, every=3))
    assert [run_folder.step_of(path) for path in run_folder.complete(tmp_path)] == [3, 6, 8]


def test_a_step_saved_twice_holds_the_second(tmp_path: Path) -> None:
    """As after a step that a stopped run had reached and saved before."""
    for value in (1.0, 2.0):
        path = save(tmp_path, 4, state({("w", 0): piece(value, 3)}))
    live = {("w", 0): empty(3)}
    assert load(open_checkpoint(path), state(live), mesh()).step == 4
    assert live["w", 0]["master"].tolist() == [2.0, 3.0, 4.0]


def test_the_files_are_what_the_library_reads_and_the_manifest_is_json(tmp_path: Path) -> None:
    bias = {"layers.0.gate.bias": torch.tensor([0.5])}
    what = state({("w", 0): piece(0.0, 6, torch.bfloat16)}, bias, w=(2, 3))
    saver = Saver(tmp_path, Keep(1), mesh(), DataIdentity("d" * 64, "t" * 64))
    saver.begin(3, what)
    saver.close()
    path = run_folder.named(tmp_path, 3)
    read = load_file(path / "rank-00000.safetensors")
    assert read["w@0/master"].tolist() == [0, 1, 2, 3, 4, 5]
    assert read["w@0/exp_avg"].dtype is torch.bfloat16
    assert read["buffer/layers.0.gate.bias"].tolist() == [0.5]
    manifest = json.loads((path / "manifest.json").read_text())["manifest"]
    assert manifest["parameters"] == {"w": [2, 3]}
    assert manifest["data"], manifest["tokenizer"] == ("d" * 64, "t" * 64)
    assert whole(open_checkpoint(path), "w").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert whole(open_checkpoint(path), "layers.0.gate.bias").tolist() == [0.5]
    with pytest.raises(CheckpointError, match="has no ema of w"):
        whole(open_checkpoint(path), "w", "ema")


@pytest.mark.parametrize("where", ["w", "moment", "buffer"])
def test_what_is_not_finite_is_never_saved_and_what_was_stays(tmp_path: Path, where: str) -> None:
    good, bias = piece(0.0, 4), {"bias": torch.ones(2)}
    save(tmp_path, 1, state({("w", 0): good}, bias), Keep(1))
    bad = {"w": good["master"], "moment": good["exp_avg"], "buffer": bias["bias"]}[where]
    bad[1] = float("nan" if where == "w" else "inf")
    named = {"w": r"w \(master\)", "moment": r"w \(exp_avg\)", "buffer": r"bias \(buffer\)"}[where]
    with pytest.raises(Diverged, match=f"step 2 is not saved.* rank 0: {named}; the newest checkpoint is .*00001"):
        save(tmp_path, 2, state({("w", 0): good}, bias), Keep(1))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]


def test_a_manifest_without_a_field_of_today_is_no_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, state({("w", 0): piece(0.0, 8)}, w=(8,)))
    file = folder / "manifest.json"
    fields = json.loads(file.read_text())["manifest"]
    del fields["seconds"], fields["tokenizer"]
    body = json.dumps(fields)
    digest = hashlib.sha256(body.encode()).hexdigest()
    file.write_text(f'{{"sha256":"{digest}","manifest":\n{body}\n}}\n')
    assert open_checkpoint(tmp_path).manifest.step == 3
    file.write_text(f'{{"sha256":"{digest}","manifest":\n{body.replace("3", "4", 1)}\n}}\n')
    with pytest.raises(CheckpointError, match="its checksum is not that of its contents"):
        open_checkpoint(tmp_path)


def test_an_expert_that_no_rank_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"w: \w+ of elements 6 to 8 \(experts 3 to 3\) is missing"):
        save(tmp_path, 1, state({("w", 0): piece(0.0, 6)}, w=(4, 2, 1)))
    with pytest.raises(CheckpointError, match=r"w: \w+ of elements 2 to 4 .* is stored twice"):
        save(tmp_path, 1, state({("w", 0): piece(0.0, 4), ("w", 2): piece(0.0, 6)}, w=(4, 2, 1)))
    assert run_folder.newest(tmp_path) is None


def _damage(path: Path, how: str) -> str:
    """Damage a checkpoint. Returns the name that must be said."""
    file, manifest = path / "rank-00000.safetensors", path / "manifest.json"
    content = bytearray(file.read_bytes())
    match how:
        case "flipped":
            content[-1] ^= 1
            file.write_bytes(content)
        case "header":
            content[20] ^= 1
            file.write_bytes(content)
        case "cut":
            file.write_bytes(content[:-4])
        case "missing":
            file.unlink()
        case "manifest":
            manifest.unlink()
        case "empty manifest":
            manifest.write_text("")
        case "edited manifest":
            manifest.write_text(manifest.read_text().replace('"step":2', '"step":3'))
            assert '"step":3' in manifest.read_text()
    return (manifest if "manifest" in how else file).name


@pytest.mark.parametrize(
    "how", ["flipped", "header", "cut", "missing", "manifest", "empty manifest", "edited manifest"]
)
def test_a_damaged_checkpoint_is_named_or_passed_over(tmp_path: Path, how: str) -> None:
    for step in (1, 2):
        path = save(tmp_path, step, state({("w", 0): piece(step, 4)}))
    name = _damage(path, how)
    with pytest.raises(CheckpointError, match=rf'{name}: .*run.on_damage="previous" to go on from step-00000001'):
        newest_sound(tmp_path, mesh(), "stop")
    found = newest_sound(tmp_path, mesh(), "previous")
    assert found.reader is not None
    assert found.reader.manifest.step == 1
    assert len(found.passed_over) == 1
    assert name in found.passed_over[0]
    assert (tmp_path / "checkpoints" / "step-00000002.damaged").is_dir()
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step-00000001"


def test_a_run_with_no_sound_checkpoint_does_not_begin_anew(tmp_path: Path) -> None:
    _damage(save(tmp_path, 2, state({("w", 0): piece(1.0, 4)})), "cut")
    with pytest.raises(CheckpointError, match="there is no checkpoint before it: restore it"):
        newest_sound(tmp_path, mesh(), "previous")


# Format 1.


def test_an_old_checkpoint_still_loads(tmp_path: Path) -> None:
    old(tmp_path, 7, old_state())
    found = newest_sound(tmp_path, mesh(), "stop")
    assert found.reader is not None
    live, bias = {("w", 0): empty(3), ("w", 3): empty(7)}, torch.zeros(2)
    assert load(found.reader, state(live, {"bias": bias}, w=(5, 2)), mesh()) == Loaded(7, frozenset())
    assert live["w", 3]["master"].tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert live["w", 3]["exp_avg"].tolist() == [-3, -4, -5, -6, -7, -8, -9]
    assert bias.tolist() == [1.0, 2.0]
    with pytest.raises(CheckpointError, match=r"w is of \[10\] there and \[3, 2\] here"):
        load(found.reader, state({("w", 0): empty(6)}, {}, w=(3, 2)), mesh())


class _Hostile:
    """Unpickled by pickle itself, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def test_no_pickle_of_an_old_checkpoint_runs_code(tmp_path: Path) -> None:
    path = old(tmp_path, 7, old_state())
    (path / ".metadata").write_bytes(pickle.dumps(_Hostile(str(tmp_path / "ran"))))
    with pytest.raises(CheckpointError, match=r"\.metadata: asks for \w+\.open, which no checkpoint needs"):
        newest_sound(tmp_path, mesh(), "stop")
    assert not (tmp_path / "ran").exists()


def test_no_pickled_tensor_of_an_old_checkpoint_runs_code(tmp_path: Path) -> None:
    path = old(tmp_path, 7, old_state())
    (data,) = path.glob("*.distcp")
    hostile = io.BytesIO()
    torch.save(_Hostile(str(tmp_path / "ran")), hostile)
    size = data.stat().st_size
    data.write_bytes(hostile.getvalue().ljust(size, b"\0") if size else pickle.dumps(0))
    with pytest.raises(CheckpointError, match=rf"{data.name}: damaged"):
        newest_sound(tmp_path, mesh(), "stop")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("how", ["empty step", "no index", "cut", "nan", "cut index"])
def test_a_damaged_old_checkpoint_is_named(tmp_path: Path, how: str) -> None:
    content = old_state()
    if how == "nan":
        content["w@4/master"][1] = float("nan")
    path = old(tmp_path, 7, content)
    (data,) = path.glob("*.distcp")
    match how:
        case "empty step":
            (path / "state.json").write_text("")
        case "no index":
            (path / ".metadata").unlink()
        case "cut index":
            (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:-20])
        case "cut":
            data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    name = {"empty step": "state.json", "no index": ".metadata", "cut index": ".metadata"}.get(how, data.name)
    with pytest.raises(CheckpointError, match=f"{name}: .*restore it"):
        newest_sound(tmp_path, mesh(), "stop")
