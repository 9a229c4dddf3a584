"""vLLM on an export, in its own virtual environment, which has no dryvine: `python vllm_log_probs.py FOLDER ASKED OUT`.

ASKED is JSON: {"texts": [...], "tokens": [[...], ...]}. OUT gets {"tokens": its ids of each text, "log_probs": of each
list of tokens [T, vocab], of the next token after each}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

os.environ |= {
    # Latents of other widths than V3's need plain attention on a CPU.
    "VLLM_MLA_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams


class Logprob(Protocol):
    logprob: float


def row(given: Mapping[int, Logprob] | None) -> list[float]:
    """By token id."""
    assert given is not None
    return [given[token].logprob for token in range(len(given))]


def main(folder: str, asked: Path, out: Path) -> None:
    given: dict[str, Sequence[Sequence[int]]] = json.loads(asked.read_text())
    # CPUs have experts in BF16 and FP16 only; log-probabilities of all tokens are asked for.
    llm = LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=64, max_num_seqs=4, max_logprobs=-1, seed=0)
    ways = SamplingParams(temperature=0.0, max_tokens=1, logprobs=-1, prompt_logprobs=-1, detokenize=False)
    done = llm.generate([{"prompt_token_ids": list(tokens)} for tokens in given["tokens"]], ways, use_tqdm=False)
    found = [[*map(row, one.prompt_logprobs[1:]), row(one.outputs[0].logprobs[0])] for one in done]
    tokenizer = llm.get_tokenizer()
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in given["texts"]]
    out.write_text(json.dumps({"tokens": ids, "log_probs": found}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
