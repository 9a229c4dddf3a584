"""A folder of released weights, matched tensor by tensor with its config.json.

Every tensor must be expected and every expected tensor must be there: one that is missing, has another shape or dtype,
lacks its scales or has unexpected ones, or is read by nothing here, is refused by name before any weight is read. The
only exceptions are known copies (MTP's embedding and head, compared bit for bit) and computed tensors (rope tables).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dryvine.trainer.hand_off import integers
from dryvine.trainer.hand_off.encodings import SCALE, dequantize
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.export_hf import INDEX
from dryvine.trainer.hand_off.hf_config import HfConfig, read_config
from dryvine.trainer.hand_off.names import Mapped, places
from dryvine.trainer.hand_off.safetensors_file import Entry, read, read_header
from dryvine.trainer.hand_off.slices import Slice, slices
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.tensors.quantized import E4M3
from dryvine.trainer.tensors.tiles import TILE, blocks

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")


@dataclass(frozen=True)
class ReleasedWeight:
    """A tensor of the files, with its scales if it is in FP8."""

    entry: Entry
    scales: Entry | None

    def rows(self, piece: Slice) -> Tensor:
        """The FP32 values of a slice, in its shape. Raises HandOffError if one is not finite."""
        values = read(self.entry, piece.first * piece.cols, piece.elements).view(piece.shape)
        if self.scales is None:
            wide = values.float()
        else:
            grid = (blocks(piece.rows), blocks(piece.cols))
            scales = read(self.scales, piece.first // TILE * grid[1], grid[0] * grid[1])
            wide = dequantize(values, scales.float().view(grid))
        if not wide.isfinite().all():
            raise HandOffError(f"{self.entry.file}: {self.entry.name} holds numbers that are not finite")
        return wide


@dataclass(frozen=True)
class IntegerWeight:
    """One of their tensors as integers in blocks: its parts, by what their names end in."""

    entry: Entry
    parts: dict[str, Entry]

    def rows(self, piece: Slice) -> Tensor:
        """FP32, in the slice's shape. Raises HandOffError if a number is not finite."""
        found = {}
        for end, entry in self.parts.items():
            width = entry.shape[1]
            found[end] = read(entry, piece.first * width, piece.rows * width).view(piece.rows, width)
        wide = integers.dequantize(found, piece.cols)
        if not wide.isfinite().all():
            raise HandOffError(f"{self.entry.file}: {self.entry.name} holds numbers that are not finite")
        return wide


Readable = ReleasedWeight | IntegerWeight


@dataclass(frozen=True)
class Released:
    """A folder that has exactly the tensors that its config.json calls for."""

    folder: Path
    config: HfConfig
    weights: dict[str, Readable]  # by their name
    without_mtp: bool  # config.json has MTP layers, the files have none

    @property
    def shape(self) -> Shape:
        return self.config.shape


def open_released(folder: Path) -> Released:
    """Raises HandOffError naming the file and the tensor or key."""
    config = read_config(folder / "config.json")
    left = _entries(folder)
    _plausible(folder, config.shape, len(left))
    without_mtp = config.shape.mtp_depth > 0 and not _has_mtp(config.shape, left)
    shape = config.shape.model_copy(update={"mtp_depth": 0}) if without_mtp else config.shape
    weights: dict[str, Readable] = {}
    for place in places(shape):
        if config.bits and place.linear:
            weights[place.theirs] = _take_integers(folder, place, left, config.bits)
        elif not place.copy or place.theirs in left:
            weights[place.theirs] = _take(folder, place, left, config.fp8)
    _refuse_left_over(left, shape)
    released = Released(folder, config, weights, without_mtp)
    _check_copies(released, shape)
    return released


def _plausible(folder: Path, shape: Shape, tensors: int) -> None:
    """Raises HandOffError before anything is allocated by a number of config.json that the files cannot match."""
    for key, number in (("num_hidden_layers", shape.layers), ("num_nextn_predict_layers", shape.mtp_depth)):
        if number > tensors:
            raise HandOffError(f"{folder / 'config.json'}: {key}: {number}, but the files hold {tensors} tensors")


def _has_mtp(shape: Shape, left: dict[str, Entry]) -> bool:
    prefixes = tuple(f"model.layers.{shape.layers + k}." for k in range(shape.mtp_depth))
    return any(name.startswith(prefixes) for name in left)


def _entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the folder's files, by name."""
    files = _indexed(folder) if (folder / INDEX).exists() else None
    paths = sorted({folder / name for name in files.values()} if files else folder.glob("*.safetensors"))
    if not paths:
        pickle = next((path for pattern in PICKLES for path in folder.glob(pattern)), None)
        why = (
            f"{pickle.name} is a pickle, which may run any code; convert it to safetensors" if pickle else "none there"
        )
        raise HandOffError(f"{folder}: no *.safetensors: {why}")
    found: dict[str, Entry] = {}
    for path in paths:
        for name, entry in read_header(path).items():
            if name in found:
                raise HandOffError(f"{path}: {name} is also in {found[name].file.name}")
            if files and files.get(name) != path.name:
                raise HandOffError(
                    f"{folder / INDEX}: {name} lies in {path.name}, and is listed for {files.get(name, 'no file')}"
                )
            found[name] = entry
    for name in files or ():
        if name not in found:
            raise HandOffError(f"{folder / INDEX}: {name} is not in {files[name] if files else ''}")
    return found


def _indexed(folder: Path) -> dict[str, str]:
    """The index: tensor -> file."""
    path = folder / INDEX
    try:
        tree = json.loads(path.read_bytes())
        files = tree["weight_map"]
        assert isinstance(files, dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise HandOffError(f"{path}: no JSON object with a weight_map: {str(error)[:200]}") from None
    for name, file in files.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise HandOffError(f"{path}: {name}: {file!r} is not the name of a safetensors file beside it"[:400])
        if not (folder / file).is_file():
            raise HandOffError(f"{path}: {name}: there is no {file}")
    return files


def _take(folder: Path, place: Mapped, left: dict[str, Entry], fp8: bool) -> ReleasedWeight:
    """Remove a weight, and its scales, from the tensors left."""
    entry, scales = left.pop(place.theirs, None), left.pop(place.theirs + SCALE, None)
    if entry is None:
        raise HandOffError(f"{folder}: has no {place.theirs} (our {place.ours}), which config.json promises")
    if entry.shape != place.shape:
        wanted = f"config.json asks for {list(place.shape)}"
        raise HandOffError(f"{entry.file}: {place.theirs}: has shape {list(entry.shape)}, and {wanted}")
    if entry.dtype is E4M3:
        _check_scales(place, entry, scales, fp8)
    elif entry.dtype not in FLOATS:
        raise HandOffError(f"{entry.file}: {place.theirs}: is {entry.dtype}; weights are FP32, BF16, FP16 or FP8 here")
    elif scales is not None:
        raise HandOffError(f"{scales.file}: {scales.name}: scales of a weight that is not in FP8, but {entry.dtype}")
    return ReleasedWeight(entry, scales)


def _take_integers(folder: Path, place: Mapped, left: dict[str, Entry], bits: int) -> IntegerWeight:
    """Take all parts of a weight out of what is left."""
    parts = {}
    for end, (dtype, shape) in integers.announced(bits, *place.shape).items():
        name = place.theirs + end
        if (entry := left.pop(name, None)) is None:
            raise HandOffError(f"{folder}: has no {name} (our {place.ours}), which config.json promises")
        if (entry.dtype, entry.shape) != (dtype, shape):
            has = f"{entry.dtype} {list(entry.shape)}"
            raise HandOffError(f"{entry.file}: {name}: is {has}, and {bits} bits need {dtype} {list(shape)}")
        parts[end] = entry
    return IntegerWeight(parts[""], parts)


def _check_scales(place: Mapped, entry: Entry, scales: Entry | None, fp8: bool) -> None:
    if not place.linear:
        raise HandOffError(f"{entry.file}: {entry.name}: is in FP8, which released checkpoints keep to Linears")
    if scales is None:
        raise HandOffError(f"{entry.file}: {entry.name}: is in FP8 and has no {entry.name + SCALE}")
    if not fp8:
        raise HandOffError(f"{entry.file}: {entry.name}: is in FP8, but config.json has no quantization_config")
    grid = tuple(blocks(size) for size in place.shape)
    if scales.shape != grid or scales.dtype not in FLOATS:
        described = f"{scales.dtype} {list(scales.shape)}"
        raise HandOffError(f"{scales.file}: {scales.name}: is {described}, and blocks of 128 x 128 need {list(grid)}")


def _refuse_left_over(left: dict[str, Entry], shape: Shape) -> None:
    strange = sorted(name for name in left if not COMPUTED.fullmatch(name))
    if strange:
        more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
        raise HandOffError(
            f"{left[strange[0]].file}: {strange[0]}{more}: nothing of a model of {shape.layers} layers and "
            f"{shape.mtp_depth} of MTP; is config.json of this checkpoint?"
        )


def _check_copies(released: Released, shape: Shape) -> None:
    """MTP's embedding and head must equal the model's, since ours shares them."""
    mains = {place.ours: place for place in places(shape) if not place.copy}
    for place in (place for place in places(shape) if place.copy and place.theirs in released.weights):
        copy, main = released.weights[place.theirs], released.weights[mains[place.ours].theirs]
        for ours, theirs in _pairs(main, copy, mains[place.ours], place):
            if not torch.equal(ours, theirs):
                raise HandOffError(
                    f"{copy.entry.file}: {place.theirs}: is not a copy of {main.entry.name}, and ours has one for both"
                )


def _pairs(main: Readable, copy: Readable, ours: Mapped, theirs: Mapped) -> Iterator[tuple[Tensor, Tensor]]:
    for one, other in zip(slices(ours), slices(theirs), strict=True):
        yield main.rows(one), copy.rows(other)
