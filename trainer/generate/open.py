"""Opens a model to generate with: from a run folder, RUN@STEP, or a folder of released weights.

Weights are read in slices straight into the parameters, so loading needs the model's own size in memory and 32 MiB. MTP
is left out unless it is to speculate.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from pydantic import ValidationError
from torch import Tensor

from dryvine.comm.dispatch.single_rank import SingleRank
from dryvine.trainer.checkpoint.run_folder import step_of
from dryvine.trainer.config import RECORDED
from dryvine.trainer.data.spec import OnProgress
from dryvine.trainer.generate.dialogue import Dialogue, TemplateDialogue, TunedDialogue
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.export_hf import weights
from dryvine.trainer.hand_off.names import places
from dryvine.trainer.hand_off.released import open_released
from dryvine.trainer.hand_off.run_files import OpenRun, open_run
from dryvine.trainer.hand_off.slices import Slice, slices
from dryvine.trainer.hand_off.tokenizer_files import TokenizerFiles, open_tokenizer
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.shape import Shape, blocks
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.rl.chat import Chat
from dryvine.trainer.rl.chat_config import ChatConfig
from dryvine.trainer.tensors.int8 import Int8
from dryvine.trainer.tensors.weight import Weight

LINEAR = frozenset({"q", "q_a", "q_b", "kv_a", "o", "gate_up", "down", "project"})  # what `dtype` int8 rounds
Read = Callable[[Slice], Tensor]  # FP32, in the slice's shape


@dataclass(frozen=True)
class WeightSource:
    """Where weights are and what shape they have. No weight has been read yet."""

    name: str  # as typed
    folder: Path
    shape: Shape  # without MTP, unless that was asked for
    read: Read
    biases: dict[str, Tensor]  # of gates, that a slice does not name
    run: OpenRun | None

    @property
    def step(self) -> int | None:
        """Of a run's checkpoint."""
        return step_of(self.run.stored.path) if self.run else None

    def tokenizer(self, given: Path | None) -> TokenizerFiles:
        """`given`, or that of the run or folder. Raises HandOffError or DataError."""
        found = self.run.tokenizer() if self.run else self.folder
        return open_tokenizer(found, given, None, self.shape.vocab)

    def dialogue(self, files: TokenizerFiles) -> Dialogue:
        """By the run's own templates if it was fine-tuned, else by the tokenizer's chat template."""
        config = self.folder / RECORDED
        tables = tomllib.loads(config.read_text()) if self.run and config.exists() else {}
        tuned = next((tables[name] for name in ("rl", "sft") if "chat" in tables.get(name, {})), None)
        if tuned is None:
            return TemplateDialogue(files)
        try:
            return TunedDialogue(Chat(ChatConfig.model_validate(tuned["chat"] | {"tokenizer": str(files.file)})))
        except ValidationError as error:
            raise HandOffError(f"{config}: chat: {str(error).splitlines()[0]}") from None


def open_weights(spec: str, mtp: bool = False) -> WeightSource:
    """`mtp`: with the model's MTP. Raises HandOffError or CheckpointError naming what is wrong."""
    folder = Path(spec)
    if (folder / "config.json").exists():
        released = open_released(folder)
        return WeightSource(
            spec,
            folder,
            _part(spec, released.shape, mtp),
            lambda piece: released.weights[piece.place.theirs].rows(piece),
            {},
            None,
        )
    run = open_run(spec)
    return WeightSource(
        spec, run.folder, _part(spec, run.shape, mtp), lambda piece: weights(run.stored, piece), run.stored.buffers, run
    )


def load(
    source: WeightSource, dtype: torch.dtype, device: torch.device, on_progress: OnProgress, experts: bool = True
) -> Model:
    """The whole model, as one stage on one device; without `experts`, expert weights get no memory. With int8 on a
    CPU, weights of Linears and experts are in 8 bits, everything else in FP32. Raises HandOffError if it cannot fit."""
    shape = source.shape
    names = tuple(block.name for block in blocks(shape))
    spec = Spec(shape, torch.float32 if dtype == torch.int8 else dtype, "meta")
    model = Model(spec, {0: names}, SingleRank(shape.routed))
    held = {name: weight for name, weight in model.named_parameters() if experts or not weight.expert}
    short = {name for name in held if dtype == torch.int8 and name_in_8_bits(name)}
    total = sum(weight.numel() for weight in held.values())
    needed = sum(weight.numel() * (1 if name in short else spec.dtype.itemsize) for name, weight in held.items())
    _check_memory(source, needed, dtype, device)
    _give_memory(model, device, held.keys() - short)
    for name in short:
        held[name].int8 = Int8.empty(held[name].numel() // held[name].shape[-1], held[name].shape[-1])
    done = 0
    tensors = {name: weight for name, weight in model.named_parameters() if name in held} | model.buffers
    for count in fill(tensors, source):
        done += count
        on_progress("reading weights", done, max(done, total))
    return model


def name_in_8_bits(name: str) -> bool:
    """Whether an 8-bit model has this parameter in 8 bits: matrices of blocks but the gate's, which selects, and that
    of keys and values, which is no Linear while decoding."""
    end = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return name.startswith(("layers.", "mtp.")) and end in LINEAR


def _give_memory(model: Model, device: torch.device, names: Set[str]) -> None:
    """Allocate the named parameters; zero the biases."""
    for prefix, module in model.root.named_modules():
        for name, old in module.named_parameters(recurse=False):
            if f"{prefix}.{name}" in names:
                module.register_parameter(name, cast(Weight, old).empty_on(device))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.zeros_like(buffer, device=device))
    model.spec = replace(model.spec, device=device)


@torch.no_grad()
def fill(tensors: dict[str, Tensor], source: WeightSource) -> Iterator[int]:
    """Read the named tensors in place. Yields the number of elements of each slice."""
    for name, bias in source.biases.items():
        if name in tensors:
            tensors[name].copy_(bias)
    for place in places(source.shape):
        if place.ours in tensors and not place.copy:
            for piece in slices(place):
                _write(tensors[place.ours], piece, source.read(piece))
                yield piece.elements


def _write(tensor: Tensor, piece: Slice, values: Tensor) -> None:
    if isinstance(tensor, Weight) and tensor.int8 is not None:
        tensor.int8.write(piece.start // piece.cols, values)
    else:
        tensor.view(-1)[piece.start : piece.start + piece.elements] = values.flatten()


def _part(spec: str, shape: Shape, mtp: bool) -> Shape:
    if mtp and not shape.mtp_depth:
        raise HandOffError(f"{spec}: --speculate takes the model's MTP, and it has none: leave that out")
    return shape.model_copy(update={"mtp_depth": shape.mtp_depth if mtp else 0, "recompute": ()})


def _check_memory(source: WeightSource, needed: int, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[0]
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        smaller = "; --dtype bf16 needs half" if dtype == torch.float32 else ""
        smaller += ", int8 a quarter" if smaller and device.type == "cpu" else ""
        smaller += "; --expert-memory reads experts when they are asked for" if device.type == "cpu" else ""
        raise HandOffError(
            f"{source.name}: {needed / 1e9:.1f} GB of weights, and this {device.type} has {there / 1e9:.1f} GB{smaller}"
        )
