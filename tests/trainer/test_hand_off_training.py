"""Weights that left and came back train on as if they had stayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dryvine.trainer.checkpoint.reader import open_checkpoint, whole
from dryvine.trainer.config import Config
from dryvine.trainer.hand_off.commands import ExportAs, export_run
from dryvine.trainer.hand_off.import_hf import import_hf
from dryvine.trainer.hand_off.run_files import open_run
from tests.support.hand_off import quiet
from tests.support.rig import train_on


def same_weights(a: Path, b: Path) -> bool:
    one, other = open_checkpoint(a), open_checkpoint(b)
    names = [*one.manifest.parameters, *one.manifest.buffers()]
    assert other.manifest.parameters == one.manifest.parameters
    return all(torch.equal(whole(one, name), whole(other, name)) for name in names)


@pytest.mark.long
def test_exported_and_imported_weights_train_on_to_the_same_bits(
    tiny: Callable[..., Config], count: Callable[[int, int], int], tmp_path: Path
) -> None:
    """With the optimizer kept, as the run that never left; without, as one that restarts the optimizer there."""
    half = count(2, 20)
    steps = (f"run.steps={2 * half}", f"run.checkpoint_every={half}", f"run.eval_every={2 * half}")
    train_on(0, tiny("run.name=stayed", *steps))
    left = f"{tmp_path / 'stayed'}@{half}"
    export_run(open_run(left), tmp_path / "out", ExportAs("hf", dtype="fp32"), quiet)

    import_hf(tmp_path / "out", tmp_path / "back", open_run(left), quiet)
    train_on(0, tiny("run.name=back", *steps))
    assert same_weights(tmp_path / "stayed", tmp_path / "back")

    import_hf(tmp_path / "out", tmp_path / "weights", None, quiet)
    anew = (f"run.steps={half}", f"run.checkpoint_every={half}", f"run.eval_every={half}")
    source = tmp_path / "stayed" / "checkpoints" / f"step-{half:08d}"
    train_on(0, tiny("run.name=a", f'run.init_from="{source}"', *anew))
    train_on(0, tiny("run.name=b", f'run.init_from="{tmp_path / "weights"}"', *anew))
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert not same_weights(tmp_path / "a", tmp_path / "stayed")
