"""Masters and moments in host memory: who steps them, to which bits, how they get there, and checkpoints across."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dryvine.comm.mesh import Layout, make_mesh
from dryvine.comm.pending import Pending
from dryvine.parallel import host_copy
from dryvine.parallel.bucket import BucketMemory
from dryvine.parallel.host_copy import HostCopies
from dryvine.parallel.zero import Zero
from dryvine.trainer import adam
from dryvine.trainer.adam import DeepSpeedAdamW, Operands, TorchAdamW, Update, choose_adam
from dryvine.trainer.checkpoint.reader import open_checkpoint, whole
from dryvine.trainer.config import Config
from dryvine.trainer.cpu_adam import load_cpu_adam
from dryvine.trainer.optim import Optimizer
from dryvine.trainer.ramps import OptimConfig
from tests.support.rig import train_on

Tiny = Callable[..., Config]
ELSEWHERE = BucketMemory(offload=True)
CONFIG = OptimConfig(offload="cpu")


class FakeOp:
    """DeepSpeed's compiled module: notes calls, and steps nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def create_adam(self, *given: Any) -> int:
        self.calls.append(("create", *given))
        return 0

    def adam_update(self, *given: Any) -> int:
        self.calls.append(("update", *given))
        return 0


def operands(size: int = 16) -> Operands:
    return Operands(*(torch.full((size,), float(n)) for n in range(4)), matrices=size // 2)


def mesh_of(*said: str) -> mock.Mock:
    """A mesh whose ranks said that of DeepSpeed's module: "" where it was loaded."""
    return mock.Mock(gather=lambda own, what: list(said), rank=0)


def test_the_bits_of_deepspeeds_step_depend_on_its_number_alone() -> None:
    """Its object keeps powers of the betas from call to call, so each call has an object of its own. Matrices decay,
    vectors do not."""
    op, on = FakeOp(), operands()
    DeepSpeedAdamW(CONFIG, op)(on, torch.tensor(4.0), Update(1e-3, 1.0, 0.1))
    matrices, vectors = ((1e-3, 0.9, 0.95, 1e-8, decay) for decay in (0.1, 0.0))
    assert [call[:-4] if call[0] == "update" else call for call in op.calls] == [
        ("create", 0, *matrices, True, False),
        ("update", 0, 5, *matrices, True),
        ("create", 0, *vectors, True, False),
        ("update", 0, 5, *vectors, True),
    ]
    for call, start in ((op.calls[1], 0), (op.calls[3], 8)):
        parts = zip(call[-4:], on.tensors, strict=True)
        assert all(given.data_ptr() == of[start:].data_ptr() and len(given) == 8 for given, of in parts)


def test_deepspeeds_is_taken_where_all_ranks_have_it_and_torchs_is_said_with_the_reason() -> None:
    with mock.patch.object(adam, "load_cpu_adam", FakeOp), mock.patch.object(torch, "get_num_threads", return_value=4):
        engine, said = choose_adam(CONFIG, mesh_of("", ""))
        assert isinstance(engine, DeepSpeedAdamW)
        assert said.endswith("stepped by DeepSpeed's CPU Adam on 4 threads")
        engine, said = choose_adam(CONFIG, mesh_of("", "ImportError: no compiler"))
        assert isinstance(engine, TorchAdamW), "bits must not depend on the host"
        assert (
            "torch's fused AdamW on 4 threads, as rank 1 has no DeepSpeed's CPU Adam (ImportError: no compiler)" in said
        )
    with mock.patch.object(adam, "load_cpu_adam", return_value="RuntimeError: x"):
        assert isinstance(choose_adam(CONFIG, mesh_of("RuntimeError: x"))[0], TorchAdamW)


def optimizer(memory: BucketMemory = ELSEWHERE, config: OptimConfig = CONFIG) -> Optimizer:
    torch.manual_seed(0)
    named = {"matrix": nn.Parameter(torch.randn(30, 50)), "vector": nn.Parameter(torch.randn(40))}
    return Optimizer(Zero(named, make_mesh(Layout(), torch.device("cpu"), timedelta(seconds=9)), memory=memory), config)


def stepped(ours: Optimizer, steps: int = 4) -> dict[str, Tensor]:
    """Masters after updates from gradients that the device had."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for bucket in ours.zero.buckets:
            bucket.grads.copy_(torch.randn(bucket.grads.shape, generator=generator))
        ours.update(1e-2, ours.reduce(1.0), 1.0)
    return {p.name: p.master.clone() for p in ours.pieces}


def test_state_off_the_device_is_stepped_to_the_same_bits() -> None:
    with mock.patch.object(adam, "load_cpu_adam", return_value="not here"):
        there = stepped(away := optimizer())
    here = stepped(optimizer(BucketMemory(), OptimConfig()))
    assert all(torch.equal(here[name], there[name]) for name in here)
    (bucket,) = away.zero.buckets
    assert bucket.grad is not bucket.grad_shard
    assert torch.equal(bucket.values, bucket.master), "the device has what the host's masters round to"


@pytest.mark.long
def test_deepspeeds_step_is_torchs_to_1e_6_and_the_same_bits_twice() -> None:
    """Compiles it at first use on a machine."""
    if isinstance(why := load_cpu_adam(), str):
        pytest.skip(f"DeepSpeed's CPU Adam cannot be built here: {why}")
    ours = optimizer()
    assert isinstance(ours.adam, DeepSpeedAdamW)
    first, again = stepped(ours), stepped(optimizer())
    torchs = stepped(optimizer(BucketMemory(), OptimConfig()))
    for name in first:
        assert torch.equal(first[name], again[name])
        torch.testing.assert_close(first[name], torchs[name], rtol=1e-6, atol=1e-6)


def test_checkpoints_go_from_host_memory_to_the_device_and_back(tiny: Tiny) -> None:
    with mock.patch.object(adam, "load_cpu_adam", return_value="not here"):
        run = ("run.eval_every=100", "run.checkpoint_every=1", "model.layers=2", "batch.sequences=4")
        train_on(0, tiny(*run, "run.steps=3", "run.name=calm"))
        train_on(0, tiny(*run, "run.steps=1", "run.name=moved", "optim.offload=cpu"))
        train_on(0, tiny(*run, "run.steps=2", "run.name=moved"))
        train_on(0, tiny(*run, "run.steps=3", "run.name=moved", "optim.offload=cpu"))
    folder = tiny().run.folder.parent
    calm, moved = (open_checkpoint(folder / name) for name in ("calm", "moved"))
    for name in calm.manifest.parameters:
        for field in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(whole(calm, name, field), whole(moved, name, field)), (name, field)


class FakeStream:
    """A CUDA stream that notes what is asked of it."""

    def __init__(self, name: str, noted: list[str]) -> None:
        self.name, self.noted = name, noted

    def wait_stream(self, other: FakeStream) -> None:
        self.noted.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: FakeStream) -> None:
        self.noted.append(f"{self.name} waits for the copy")

    def record_event(self) -> FakeStream:
        self.noted.append(f"{self.name} records")
        return self

    def synchronize(self) -> None:
        self.noted.append("the host waits for the copy")

    def query(self) -> bool:
        return True


def test_on_a_gpu_a_sum_is_copied_beside_compute_and_the_host_waits_for_it_last() -> None:
    """What the current stream and the copies' own are told, in order; a GPU is not here."""
    noted: list[str] = []
    compute, copies = FakeStream("compute", noted), FakeStream("copies", noted)

    @contextmanager
    def inside(stream: FakeStream) -> Iterator[None]:
        noted.append(f"in {stream.name}")
        yield
        noted.append("out")

    fakes = mock.Mock(Stream=lambda device: copies, stream=inside, current_stream=lambda device: compute)
    with mock.patch.object(host_copy.torch, "cuda", fakes):
        host = HostCopies(torch.device("cuda", 0))
        source, target = torch.arange(3.0), torch.zeros(3)
        fetched = host.fetch(Pending(lambda: noted.append("the sum is waited for")), source, target)
        assert noted == [
            "copies waits for compute", "in copies", "the sum is waited for", "copies records", "out",
        ]  # fmt: skip
        noted.clear()
        fetched.wait()
    assert noted == ["compute waits for the copy", "the host waits for the copy"]
    assert torch.equal(target, source)
