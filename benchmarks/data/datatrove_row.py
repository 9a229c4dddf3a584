"""datatrove's row of `benchmarks.data.build`, run by a Python that has datatrove and need not have dryvine.

    python datatrove_row.py FOLDER PROCESSES

FOLDER has `text` and `tokenizer.json`. Prints [seconds, CPU seconds, tokens] as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main(folder: str, processes: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker a core: threads in each would only be in the way
    started, burnt = time.perf_counter(), _cpu()
    out = f"{folder}/out"
    end = "<|endoftext|>"
    writer = DocumentTokenizer(out, f"{folder}/tokenizer.json", eos_token=end, shuffle_documents=False)
    pipeline = [JsonlReader(f"{folder}/text", glob_pattern="*.jsonl"), writer]
    # Forked, so that what its workers burn is counted as this process's children's.
    stats = LocalPipelineExecutor(
        pipeline, tasks=processes, workers=processes, logging_dir=f"{folder}/out/log", start_method="fork"
    ).run()
    tokens = next(step.stats["tokens"].total for step in stats.stats if "tokens" in step.stats)
    print(json.dumps([time.perf_counter() - started, _cpu() - burnt, tokens]))


def _cpu() -> float:
    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in each)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
