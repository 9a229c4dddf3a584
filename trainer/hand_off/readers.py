"""Programs that open an export, behind one interface. A new one is a class and a line in READERS.

They compute in FP32 as far as they can, so that a remaining difference is a mistake and not rounding; `limit` is the
difference that their arithmetic explains, and `near` the margin below which it may route a token elsewhere.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

LENGTH = 48  # tokens of a prompt, at most
GGUF = "model.gguf"  # the file in an export's folder
FP32, LESS = 1e-3, 0.05  # |difference of log-probabilities| of arithmetic in FP32, and in BF16 or 8 bits
# Of margins (see `ties`): below, arithmetic of so few bits may choose other experts. FP32 repeats every choice; of
# weights of 8 and 4 bits no position is held.
NEAR = {"f32": 0.0, "bf16": 2**-8, "f16": 2**-8, "q8_0": float("inf"), "q4_k": float("inf")}


class OpenedExport(Protocol):
    """An export, opened by one program."""

    package: ClassVar[str]  # what to install
    limit: float
    near: float

    def tokens(self, text: str) -> list[int]:
        """The text's tokens, without special tokens before or after."""

    def log_probs(self, tokens: list[int]) -> Tensor:
        """FP32 [T, vocab]: log-probabilities of the next token after each token."""


class Transformers:
    """Weights widened to FP32, attention in plain torch."""

    package: ClassVar[str] = "transformers"

    def __init__(self, folder: Path, written_as: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.limit, self.near = FP32, 0.0
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
        self._model = model.float().eval()

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def log_probs(self, tokens: list[int]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self._model(torch.tensor([tokens])).logits[0]
        return logits.float().log_softmax(-1)


class LlamaCpp:
    """Through llama-cpp-python's C interface: its class cannot turn off repacked weights, which give wrong numbers
    for Q8_0 on some CPUs. Keys and values are cached in FP32."""

    package: ClassVar[str] = "llama-cpp-python"

    def __init__(self, folder: Path, written_as: str) -> None:
        import llama_cpp as lib

        self._lib = lib
        # For BF16 and quantised weights, llama.cpp rounds the inputs to as few bits.
        self.limit, self.near = (FP32 if written_as == "f32" else LESS), NEAR[written_as]
        self._silent = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(self._silent, None)
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.use_extra_bufts = False
        self._model = lib.llama_model_load_from_file(str(folder / GGUF).encode(), params)
        if not self._model:
            raise RuntimeError("llama.cpp does not open it")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self._size = lib.llama_vocab_n_tokens(self._vocab)
        self._context = self._make_context()

    def tokens(self, text: str) -> list[int]:
        data = text.encode()
        out = (self._lib.llama_token * (len(data) + 1))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), out, len(out), False, False)
        return list(out[:count])

    def log_probs(self, tokens: list[int]) -> Tensor:
        lib, context = self._lib, self._context
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        try:
            self._fill(batch, tokens)
            if lib.llama_decode(context, batch):
                raise RuntimeError("llama.cpp does not compute it")
            flat = lib.llama_get_logits(context)[: len(tokens) * self._size]
            return torch.tensor(flat, dtype=torch.float32).view(len(tokens), -1).log_softmax(-1)
        finally:
            lib.llama_batch_free(batch)

    def _make_context(self) -> object:
        params = self._lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = LENGTH
        params.type_k = params.type_v = self._lib.GGML_TYPE_F32
        params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # Its threads spin while they wait, which on a busy machine is most of the time.
        params.n_threads = params.n_threads_batch = 1
        return self._lib.llama_init_from_model(self._model, params)

    def _fill(self, batch: object, tokens: list[int]) -> None:
        """Fill a batch that requests the logits of every position."""
        batch.n_tokens = len(tokens)  # type: ignore[attr-defined]
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1  # type: ignore[attr-defined]
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0  # type: ignore[attr-defined]


READERS: dict[str, tuple[type[Transformers] | type[LlamaCpp], ...]] = {"hf": (Transformers,), "gguf": (LlamaCpp,)}


def installed(package: str) -> str | None:
    """A package's version, or None if it is not installed."""
    module = package.removesuffix("-python").replace("-", "_")
    return version(package) if importlib.util.find_spec(module) else None
