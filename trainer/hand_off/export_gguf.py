"""A checkpoint to a GGUF file for llama.cpp, and a Modelfile for ollama.

The `gguf` library writes the header and the index. The data is written here, slice by slice, since the library takes
each tensor whole, and the experts of one layer of V3 are 15 GB.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from gguf.quants import quant_shape_to_byte_shape
from numpy.typing import NDArray
from torch import Tensor

from dryvine.trainer.checkpoint.stored import Stored
from dryvine.trainer.data.atomic import write_atomically
from dryvine.trainer.data.spec import OnProgress
from dryvine.trainer.hand_off import q4_k
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.export_hf import new_folder, weights
from dryvine.trainer.hand_off.gguf_keys import ARCH, Key, gguf_refusal, model_keys, tokenizer_keys
from dryvine.trainer.hand_off.gguf_names import GgufTensor, Type, gguf_tensors
from dryvine.trainer.hand_off.names import Mapped
from dryvine.trainer.hand_off.readers import GGUF
from dryvine.trainer.hand_off.run_files import OpenRun
from dryvine.trainer.hand_off.slices import Slice, slices
from dryvine.trainer.hand_off.tokenizer_files import TokenizerFiles
from dryvine.trainer.model.shape import Shape

FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_k": gguf.LlamaFileType.MOSTLY_Q4_K_M,
}


class GgufFile(NamedTuple):
    """The planned contents of a file."""

    keys: list[Key]
    tensors: list[GgufTensor]


def plan_gguf(run: OpenRun, quant: str, tokenizer: TokenizerFiles) -> GgufFile:
    """The file for a run. Raises HandOffError for a model or tokenizer that llama.cpp does not support."""
    shape = run.shape
    if reason := gguf_refusal(shape):
        raise HandOffError(reason)
    general = [
        Key("general.file_type", int(FILE_TYPES[quant]), gguf.GGUFValueType.UINT32),
        Key("general.quantization_version", gguf.GGML_QUANT_VERSION, gguf.GGUFValueType.UINT32),
    ]
    keys = [*general, *model_keys(shape), *tokenizer_keys(tokenizer, shape.vocab)]
    return GgufFile(keys, [*gguf_tensors(shape, quant), *_moved_biases(run)])


def export_gguf(run: OpenRun, out: Path, quant: str, tokenizer: TokenizerFiles, on_progress: OnProgress) -> None:
    """Write the new folder `out`. Raises HandOffError, and leaves no files then."""
    file = plan_gguf(run, quant, tokenizer)
    with new_folder(out) as folder:
        total, done = sum(map(_bytes, file.tensors)), 0
        for written in write_gguf(folder / GGUF, file, run.stored):
            done += written
            on_progress("writing weights", done, total)
        write_atomically(folder / "Modelfile", modelfile(tokenizer, run.shape))


def _moved_biases(run: OpenRun) -> Iterator[GgufTensor]:
    """The biases of softmax gates that training has moved. GGUF can hold them; DeepSeek's own V2 files cannot."""
    if run.shape.score == "softmax":
        for name, bias in run.stored.buffers.items():
            if name.startswith("layers.") and bias.any():
                place = Mapped(name, name, 0, (run.shape.routed,))
                number = name.split(".")[1]
                yield GgufTensor(f"blk.{number}.exp_probs_b.bias", place.shape, Type.F32, (place,))


def write_gguf(path: Path, file: GgufFile, stored: Stored) -> Iterator[int]:
    """Write the file. Yields the bytes of each slice after it is written."""
    writer = gguf.GGUFWriter(path, ARCH)
    try:
        for key in file.keys:
            writer.add_key_value(key.name, key.value, key.type)
        for tensor in file.tensors:
            announced = (_byte_shape(tensor), np.dtype(np.uint8), _bytes(tensor))
            writer.add_tensor_info(tensor.name, *announced, raw_dtype=tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (out,) = writer.fout
        for tensor in file.tensors:
            writer.write_padding(out, out.tell())
            for data in _encoded(tensor, stored):
                out.write(data.data)
                yield data.nbytes
        writer.write_padding(out, out.tell())
    finally:
        writer.close()


def _encoded(tensor: GgufTensor, stored: Stored) -> Iterator[NDArray[np.uint8]]:
    return (encode(tensor, place, rows) for place in tensor.parts for rows in _rows(tensor, place, stored))


def _rows(tensor: GgufTensor, place: Mapped, stored: Stored) -> Iterator[Tensor]:
    if tensor.transposed:  # a head's keys: small
        yield weights(stored, Slice(place, 0, place.shape[0])).t().contiguous()
    else:
        yield from (weights(stored, piece) for piece in slices(place))


def encode(tensor: GgufTensor, place: Mapped, rows: Tensor) -> NDArray[np.uint8]:
    """FP32 rows in the tensor's type. Raises HandOffError for values that are not finite before or after."""
    values = rows.numpy()
    if not np.isfinite(values).all():
        raise HandOffError(f"{place.ours} ({tensor.name}) holds numbers that are not finite; export an earlier step")
    if tensor.type is Type.F16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise HandOffError(f"{place.ours} ({tensor.name}) holds numbers that are too large for FP16; use bf16")
    if tensor.type is Type.Q4_K:
        return q4_k.quantize(values)
    encoded: NDArray[np.uint8] = gguf.quants.quantize(values, tensor.type).view(np.uint8)
    return encoded


def reader_of(shape: Shape, quant: str) -> Callable[[Mapped, Tensor], Tensor]:
    """A function from a whole FP32 weight to the FP32 values that a reader of the file gets."""
    parts: defaultdict[str, list[tuple[GgufTensor, Mapped]]] = defaultdict(list)
    for tensor in gguf_tensors(shape, quant):
        for part in tensor.parts:
            parts[part.ours].append((tensor, part))

    def rounded(place: Mapped, values: Tensor) -> Tensor:
        flat = values.flatten().clone()
        for tensor, part in parts[place.ours]:
            at = part.first - place.first
            if 0 <= at < place.elements:
                own = flat[at : at + part.elements].view(part.shape)
                own = own.t() if tensor.transposed else own
                encoded = encode(tensor, part, own.contiguous())
                back = gguf.quants.dequantize(encoded, tensor.type).reshape(own.shape)
                own.copy_(torch.from_numpy(back.copy()))
        return flat.view(values.shape)

    return rounded


def _byte_shape(tensor: GgufTensor) -> tuple[int, ...]:
    return quant_shape_to_byte_shape(tensor.shape, tensor.type)


def _bytes(tensor: GgufTensor) -> int:
    return math.prod(_byte_shape(tensor))


def modelfile(tokenizer: TokenizerFiles, shape: Shape) -> str:
    """A Modelfile for `ollama create NAME -f Modelfile`. ollama uses the GGUF's chat template; for a base model,
    which has none that it was trained with, the prompt is passed through."""
    return (
        f"FROM ./{GGUF}\n"
        'TEMPLATE """{{ .Prompt }}"""\n'
        f'PARAMETER stop "{tokenizer.end_text}"\n'
        f"PARAMETER num_ctx {shape.max_position}\n"
    )
