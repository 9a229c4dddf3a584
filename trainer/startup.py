"""What a run prints before its first step: dispatcher, wire, memory, and the kernels it has chosen."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from dryvine.comm.dispatch.choose import pick
from dryvine.comm.topology import GroupLimit, Topology, mismatch
from dryvine.trainer.activations import activations
from dryvine.trainer.config import Config, flat
from dryvine.trainer.data.blend import Blend
from dryvine.trainer.graph_memory import graph_line, recordable
from dryvine.trainer.ramps import sequences_before
from dryvine.trainer.rehearse import rehearse, report_loads
from dryvine.trainer.rig import Rig, row_bytes
from dryvine.trainer.rl.presets import PRESETS


def get_ready(rig: Rig, topology: Topology | None, console: Console, steps_done: int) -> None:
    """Load all kernels on a GPU, and print `startup_lines`; the last thing before the first step. Collective over each
    expert-parallel group."""
    if rig.mesh.device.type == "cuda":
        rehearse(rig)
        report_loads(rig.mesh.rank)
    for line in startup_lines(rig, topology, steps_done):
        console.print(line)


def startup_lines(rig: Rig, topology: Topology | None, steps_done: int) -> Iterator[str]:
    """Lines for the console. With `topology` None, none about the dispatcher."""
    if topology is not None:
        yield from _token_routes(rig, topology)
    if rig.mesh.pp > 1:
        yield f"pipeline messages: {rig.carrier}"
    yield activations(rig.plan, rig.mesh.device.type == "cuda")
    if rig.fp8 is not None:
        yield rig.fp8.chosen
    if rig.mesh.device.type == "cuda":
        yield rig.replays
        if rig.graphs is not None:
            yield graph_line(rig.plan)
    yield from _blend(rig)
    if rig.optimizer.chosen:
        yield rig.optimizer.chosen
    if rig.config.rl:
        yield preset_line(rig.config)
    if steps_done:
        left = "" if steps_done < rig.config.run.steps else f", and run.steps = {rig.config.run.steps}: nothing is left"
        yield f"resuming {rig.config.run.folder} after step {steps_done}{left}"


def preset_line(config: Config) -> str:
    """Which keys of its preset a run with [rl] has otherwise: any key of a file comes before it, inherited ones too."""
    assert config.rl is not None
    own, preset = dict(flat(config.model_dump(mode="json"))), config.rl.preset
    other = [f"{key} = {own[key]} ({value})" for key, value in flat(PRESETS[preset]) if own[key] != value]
    return f"rl.preset {preset}" + (f", but for {', '.join(other)}" if other else "")


def _blend(rig: Rig) -> Iterator[str]:
    """How much a run on a blend reads of each source, and which sources are too small to validate on."""
    config, blend = rig.config, rig.data.train
    if isinstance(blend, Blend):
        yield from blend.lines(sequences_before(config.batch, config.data.seq_len, config.run.steps))
        for part in blend.parts:
            if part.entry.label not in rig.data.held_out:
                yield f"data.blend: {part.entry.label} holds out less than a sequence: it has no validation loss"


def _token_routes(rig: Rig, topology: Topology) -> Iterator[str]:
    """Which dispatcher is used and why, and a warning if the model's expert groups do not match the nodes. For rank 0's
    expert-parallel group."""
    shape, asked = rig.config.model, rig.config.comm.dispatcher
    group = topology.of(range(rig.mesh.ep))
    graphs = recordable(rig.config, rig.mesh.device.type == "cuda")
    name, why = pick(group, shape.top_k, shape.routed, graphs)
    yield "comm.dispatcher: " + (f"auto takes {name}: {why}" if asked == "auto" else f"{asked}, as asked")
    limit = GroupLimit(shape.groups, shape.group_limit)
    if warning := mismatch(group, shape.routed, limit, row_bytes(rig.config)[0]):
        yield f"warning: {warning}"
