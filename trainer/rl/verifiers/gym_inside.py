"""Scores answers to reasoning-gym's questions: a JSON object a line in, one out. Runs inside a sandbox and imports
nothing of ours: `python -I -S gym_inside.py FOLDER`, with the folder that has the package.

Each answer is scored in a process of its own, since some datasets evaluate answers as Python, and by a clock whose
signal ends it, whatever it runs.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from functools import cache

sys.path.append(sys.argv[1])
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # processes and threads are few here

import reasoning_gym


@cache
def dataset_of(described: str) -> "reasoning_gym.dataset.ProceduralDataset":
    asked = json.loads(described)
    return reasoning_gym.create_dataset(asked["dataset"], seed=asked["seed"], size=asked["size"], **asked["options"])


def scored(asked: dict, writable: int) -> None:
    """In a child: write what the answer earns, and end."""
    os.setpgid(0, 0)
    signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
    dataset = dataset_of(asked["source"])
    try:
        said = {"score": float(dataset.score_answer(asked["answer"], dataset[asked["index"]])), "why": ""}
    except BaseException as error:  # of an answer that the dataset cannot read
        said = {"score": 0.0, "why": f"{type(error).__name__}: {error}"[:200]}
    os.write(writable, json.dumps(said).encode())
    os._exit(0)


def reply(line: str) -> str:
    asked = json.loads(line)
    try:
        dataset_of(asked["source"])[asked["index"]]
    except Exception as error:
        return json.dumps({"score": None, "why": f"{type(error).__name__}: {error}"[:200]})
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        scored(asked, writable)
    os.close(writable)
    with open(readable) as pipe:
        text = pipe.read(10_000)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return text.replace("\n", " ") or json.dumps({"score": 0.0, "why": "its scoring took too long, or ended"})


for each in sys.stdin:
    print(reply(each) if each.strip() else "", flush=True)  # an empty line asks whether the package is loaded
