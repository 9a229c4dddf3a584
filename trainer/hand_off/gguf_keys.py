"""The metadata keys of a GGUF file of architecture deepseek2, from which llama.cpp configures its computation.

A missing key is no error there: without the gating function it takes softmax, without groups it chooses among all
experts, and the text is merely worse. A test leaves out each key and must notice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf

from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.tokenizer_files import TokenizerFiles
from dryvine.trainer.model.shape import Shape

ARCH = "deepseek2"
# llama.cpp assumes that models with these numbers of layers have no q_lora, whatever the file says.
LITE_LAYERS = (26, 27)
LITE_48_VOCAB = 128256
Described = dict[str, list[dict[str, object]]]  # a tokenizer.json, as far as its added tokens


class Key(NamedTuple):
    name: str
    value: object
    type: gguf.GGUFValueType


def gguf_refusal(s: Shape) -> str | None:
    """Why llama.cpp (of llama-cpp-python 0.3.36) would abort on this model or compute something else, with the fix;
    or None."""
    lite = s.layers in LITE_LAYERS or (s.layers == 48 and s.vocab == LITE_48_VOCAB)
    yarn = s.yarn is not None and (s.yarn.mscale != s.yarn.mscale_all_dim or not s.yarn.mscale)
    for wrong, message in (
        (lite and s.q_lora is not None, f"q_lora with {s.layers} layers, which it takes for V2-Lite, without"),
        (_grouped(s) and s.score == "softmax", "groups with softmax scores: it ranks groups by two experts, V2 by one"),
        (s.shared == 0, "shared = 0: it asks for a shared expert"),
        (yarn, "yarn.mscale other than mscale_all_dim, or 0: it scales rotated parts by neither"),
        (s.first_dense == s.layers, "no layer of experts (first_dense = layers)"),
    ):
        if wrong:
            return f"llama.cpp cannot take this model: {message}; --format hf can"
    return None


def model_keys(s: Shape) -> Iterator[Key]:
    """The model's keys, in the order of the file."""
    whole = gguf.GGUFValueType.UINT32
    number = gguf.GGUFValueType.FLOAT32
    gating = gguf.ExpertGatingFuncType.SIGMOID if s.score == "sigmoid" else gguf.ExpertGatingFuncType.SOFTMAX
    for name, value in (
        ("context_length", s.max_position),
        ("embedding_length", s.hidden),
        ("block_count", s.layers),
        ("feed_forward_length", s.ffn),
        ("vocab_size", s.vocab),
        ("attention.head_count", s.heads),
        # Sizes of the latent that all heads share, which llama.cpp caches.
        ("attention.head_count_kv", 1),
        ("attention.q_lora_rank", s.q_lora or 0),
        ("attention.kv_lora_rank", s.kv_lora),
        ("attention.key_length", s.kv_lora + s.rope_dim),
        ("attention.value_length", s.kv_lora),
        ("attention.key_length_mla", s.qk_dim),
        ("attention.value_length_mla", s.v_dim),
        ("rope.dimension_count", s.rope_dim),
        ("leading_dense_block_count", s.first_dense),
        ("expert_feed_forward_length", s.expert_ffn),
        ("expert_count", s.routed),
        ("expert_used_count", s.top_k),
        ("expert_shared_count", s.shared),
        ("expert_gating_func", int(gating)),
        *((("expert_group_count", s.groups), ("expert_group_used_count", s.group_limit)) if _grouped(s) else ()),
    ):
        yield Key(f"{ARCH}.{name}", value, whole)
    yield Key(f"{ARCH}.expert_weights_norm", s.normalise, gguf.GGUFValueType.BOOL)
    for real, size in (
        ("attention.layer_norm_rms_epsilon", s.norm_eps),
        ("rope.freq_base", s.rope_theta),
        ("expert_weights_scale", s.route_scale),
    ):
        yield Key(f"{ARCH}.{real}", size, number)
    yield from _yarn_keys(s)


def _grouped(s: Shape) -> bool:
    """Whether group-limited routing is in the file: llama.cpp requires fewer groups used than there are, and using
    all is no limit."""
    return s.groups > 1 and s.group_limit < s.groups


def _yarn_keys(s: Shape) -> Iterator[Key]:
    if s.yarn is None:
        return
    scaling, number = f"{ARCH}.rope.scaling", gguf.GGUFValueType.FLOAT32
    yield Key(f"{scaling}.type", "yarn", gguf.GGUFValueType.STRING)
    yield Key(f"{scaling}.factor", s.yarn.factor, number)
    yield Key(f"{scaling}.original_context_length", s.yarn.original, gguf.GGUFValueType.UINT32)
    yield Key(f"{scaling}.yarn_log_multiplier", 0.1 * s.yarn.mscale_all_dim, number)
    yield Key(f"{scaling}.yarn_beta_fast", s.yarn.beta, number)
    yield Key(f"{scaling}.yarn_beta_slow", s.yarn.alpha, number)


def tokenizer_keys(tokenizer: TokenizerFiles, vocab: int) -> Iterator[Key]:
    """The keys of a byte-level BPE. Unused ids get names that occur in no text."""
    described = json.loads(tokenizer.file.read_bytes())
    if described["model"]["type"] != "BPE" or not described["model"]["merges"]:
        raise HandOffError(f"{tokenizer.file}: its tokenizer is no BPE with merges, which llama.cpp asks for")
    names, types = _tokens(tokenizer, described, vocab)
    end, string = tokenizer.vocabulary.end, gguf.GGUFValueType.STRING
    yield Key("tokenizer.ggml.model", "gpt2", string)
    yield Key("tokenizer.ggml.pre", _pre_tokenizer(tokenizer.folder, described), string)
    yield Key("tokenizer.ggml.tokens", names, gguf.GGUFValueType.ARRAY)
    yield Key("tokenizer.ggml.token_type", types, gguf.GGUFValueType.ARRAY)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    yield Key("tokenizer.ggml.merges", merges, gguf.GGUFValueType.ARRAY)
    for name in ("bos", "eos", "padding"):
        yield Key(f"tokenizer.ggml.{name}_token_id", end, gguf.GGUFValueType.UINT32)
    for name in ("bos", "eos"):
        yield Key(f"tokenizer.ggml.add_{name}_token", False, gguf.GGUFValueType.BOOL)
    yield Key("tokenizer.chat_template", tokenizer.chat_template, string)


def _tokens(tokenizer: TokenizerFiles, described: Described, vocab: int) -> tuple[list[str], list[int]]:
    names = [f"[unused {i}]" for i in range(vocab)]
    types = [int(gguf.TokenType.UNUSED)] * vocab
    for name, number in tokenizer.vocabulary.tokenizer.get_vocab(with_added_tokens=True).items():
        names[number], types[number] = name, int(gguf.TokenType.NORMAL)
    for added in described.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        types[int(str(added["id"]))] = int(kind)
    return names, types


def _pre_tokenizer(folder: Path, described: dict[str, object]) -> str:
    """llama.cpp's name of the pre-tokenizer, which it has as code."""
    said = json.dumps(described["pre_tokenizer"], ensure_ascii=False)
    match described["pre_tokenizer"]:
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}:
            return "gpt-2"
    if r"\\p{N}{1,3}" in said and "[一-龥" in said and "[A-Za-z]+|" in said:
        return "deepseek-v3"
    raise HandOffError(f"{folder}: llama.cpp has no name for how tokenizer.json cuts text into words: {said[:200]}")
