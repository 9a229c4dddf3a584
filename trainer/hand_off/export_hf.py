"""A checkpoint to safetensors with DeepSeek's names, for transformers, vLLM and converters.

The files are laid out first. Then each slice of each tensor is read from the checkpoint, cast and written to its place,
so memory does not grow with the model. The folder is renamed to its final name when everything is in it.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from dryvine.trainer.checkpoint.stored import Stored
from dryvine.trainer.data.atomic import CannotWrite
from dryvine.trainer.data.spec import OnProgress
from dryvine.trainer.hand_off.encodings import Announced, Encoding, quantization_config
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.hf_config import EPS, config_json
from dryvine.trainer.hand_off.names import BIAS, Mapped, places
from dryvine.trainer.hand_off.run_files import OpenRun
from dryvine.trainer.hand_off.safetensors_file import SafetensorsWriter
from dryvine.trainer.hand_off.slices import Slice, slices
from dryvine.trainer.hand_off.tokenizer_files import TokenizerFiles, write_json, write_tokenizer
from dryvine.trainer.model.shape import Shape

INDEX = "model.safetensors.index.json"


class ShardPlan(NamedTuple):
    """One file: the weights in it, and the tensors that store them."""

    name: str
    places: list[Mapped]
    tensors: Announced


def transformers_refusal(shape: Shape) -> str | None:
    """Why transformers 5.23 would compute something else with this model, with the fix; or None."""
    softmax = shape.score == "softmax"
    for wrong, message in (
        (shape.norm_eps != EPS, f"norm_eps = {shape.norm_eps}: its norms of latents have {EPS} whatever is asked for"),
        (softmax and shape.normalise, "normalise = true with softmax scores: its DeepseekV2 does not normalise"),
        (softmax and shape.hidden % shape.heads > 0, "its DeepseekV2 wants hidden to be a multiple of heads"),
    ):
        if wrong:
            return f"transformers cannot take this model: {message}; --format gguf can"
    return None


def _lost_biases(run: OpenRun) -> str | None:
    """Why a V2 export would lose the biases of softmax gates, for which V2's files have no place; or None."""
    if run.shape.score == "sigmoid":
        return None
    moved = next((name for name, bias in run.stored.buffers.items() if bias.any()), None)
    return moved and f"{run.stored.path}: {moved} is not zero, and V2's files have no biases; --format gguf has"


def export_hf(
    run: OpenRun, out: Path, encoding: Encoding, tokenizer: TokenizerFiles, on_progress: OnProgress, shard_bytes: int
) -> None:
    """Write the new folder `out`. Raises HandOffError for a model that the readers do not support and for weights
    that are not finite, and leaves no files then."""
    if reason := transformers_refusal(run.shape) or _lost_biases(run):
        raise HandOffError(reason)
    shards = plan_shards(places(run.shape), encoding, shard_bytes)
    with new_folder(out) as part:
        total = sum(_bytes(shard.tensors.values()) for shard in shards)
        done = 0
        for shard in shards:
            for written in _write_shard(part / shard.name, shard, encoding, run.stored):
                done += written
                on_progress("writing weights", done, total)
        _write_rest(part, run.shape, shards, encoding, tokenizer)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder to fill; it is renamed to `out` on success and deleted on an error. Raises CannotWrite, also
    for what cannot be written into it."""
    if out.exists():
        raise HandOffError(f"{out}: is there already; name another folder with --out, or delete it")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with CannotWrite.naming(out):
        part.mkdir(parents=True)
        try:
            yield part
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        os.replace(part, out)


def plan_shards(all_places: Iterable[Mapped], encoding: Encoding, shard_bytes: int) -> list[ShardPlan]:
    """Files of at most `shard_bytes`, or of one larger weight, in forward order."""
    groups: list[tuple[list[Mapped], Announced]] = []
    room = 0
    for place in all_places:
        tensors = encoding.tensors(place)
        size = _bytes(tensors.values())
        if size > room:
            groups.append(([], {}))
            room = shard_bytes
        groups[-1][0].append(place)
        groups[-1][1].update(tensors)
        room -= size
    if len(groups) == 1:
        return [ShardPlan("model.safetensors", *groups[0])]
    return [ShardPlan(f"model-{i:05d}-of-{len(groups):05d}.safetensors", *group) for i, group in enumerate(groups, 1)]


def _write_shard(path: Path, shard: ShardPlan, encoding: Encoding, stored: Stored) -> Iterator[int]:
    """Write a file. Yields the bytes of each slice after it is written."""
    with SafetensorsWriter(path, shard.tensors) as writer:
        for piece in (piece for place in shard.places for piece in slices(place)):
            try:
                parts = encoding.encode(piece.place, piece.first, weights(stored, piece))
            except ValueError as error:
                raise HandOffError(f"{stored.path}: {error}; export an earlier step") from None
            for part in parts:
                writer.write(*part)
            yield sum(part.values.nbytes for part in parts)


def weights(stored: Stored, piece: Slice) -> torch.Tensor:
    """The FP32 weights of a slice, in its shape."""
    if piece.place.ours.endswith(BIAS):
        return stored.buffers[piece.place.ours]
    return stored.read(piece.place.ours, piece.start, piece.elements).view(piece.shape)


def _write_rest(
    folder: Path, shape: Shape, shards: list[ShardPlan], encoding: Encoding, tokenizer: TokenizerFiles
) -> None:
    end = tokenizer.vocabulary.end
    dtype = "float32" if encoding.dtype == "fp32" else "bfloat16"
    config = config_json(shape) | {"dtype": dtype, "torch_dtype": dtype, "eos_token_id": end, "pad_token_id": end}
    config |= {"bos_token_id": None, "use_cache": True}
    kept = encoding.kept_plain({place.theirs: place for place in places(shape)})
    if (quantized := quantization_config(encoding.dtype, kept)) is not None:
        config["quantization_config"] = quantized
    write_json(folder / "config.json", config)
    if len(shards) > 1:
        where = {name: shard.name for shard in shards for name in shard.tensors}
        total = sum(_bytes(shard.tensors.values()) for shard in shards)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    write_tokenizer(tokenizer, folder, shape.max_position)


def _bytes(tensors: Iterable[tuple[torch.dtype, tuple[int, ...]]]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors)
