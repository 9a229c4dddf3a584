"""Text files in, dataset folder out: one pass to learn the vocabulary (unless it is given), one to tokenize and pack.

Memory is bounded by a few batches of text for each process, not by the size of any file. A build may
be killed at any instant and run again: it continues after the last whole shard, and the folder ends up the same to the
byte. `dataset.json` is written last, so no reader ever sees a half-built folder, and a lock lets any number of
processes ask for the same dataset at once: one builds, the others wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from dryvine.trainer.data.atomic import write_atomically
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.dataset import Dataset, dtype_for
from dryvine.trainer.data.inputs import Input
from dryvine.trainer.data.pack import pack
from dryvine.trainer.data.progress import BuildProgress, resume_build
from dryvine.trainer.data.spec import BuildJob, BuildSpec, OnProgress, fingerprint, no_progress
from dryvine.trainer.data.tokenizer import Vocabulary
from dryvine.trainer.data.vocabulary import prepare_vocabulary


def build(
    inputs: Sequence[Input],
    spec: BuildSpec,
    out: Path,
    on_progress: OnProgress = no_progress,
    deadline: float = 0,
    processes: int = 1,
) -> Dataset:
    """Build the dataset in `out`, resume an interrupted build, or return a finished one. With `processes` above 1,
    that many tokenize. If another process is building there, waits up to `deadline` seconds for it. Raises DataError
    if that takes longer, if `out` holds anything built from other files or settings, or if the inputs hold no text."""
    spec.check(inputs)
    identity = fingerprint(inputs, spec)
    if finished := _finished(out, identity):
        return finished
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=deadline):
            return _finished(out, identity) or _build(BuildJob(inputs, spec, out, on_progress, processes), identity)
    except Timeout:
        raise DataError(f"{out}: another process is building here, for {deadline:.0f} s now; wait, or end it") from None


def _finished(out: Path, identity: str) -> Dataset | None:
    if not (out / "dataset.json").exists():
        return None
    dataset = Dataset.load(out)
    if dataset.fingerprint != identity:
        raise DataError(f"{out}: holds a dataset of other files or settings; build into another folder, or delete it")
    return dataset


def _build(job: BuildJob, identity: str) -> Dataset:
    progress = resume_build(job.folder, identity, job.inputs)
    vocabulary = prepare_vocabulary(job)
    progress = pack(job, vocabulary, progress)
    if not progress.train.documents:
        _refuse_empty(job, progress)
    dataset = _describe(job.spec, vocabulary, progress)
    write_atomically(job.folder / "dataset.json", dataset.model_dump_json(indent=1))
    (job.folder / "progress.json").unlink()
    return dataset


def _refuse_empty(job: BuildJob, progress: BuildProgress) -> None:
    """Raise DataError, and leave a folder in which the build can be retried with other settings."""
    for name in ("progress.json", "tokenizer.json"):
        (job.folder / name).unlink()
    if held_out := progress.val.documents:
        raise DataError(f"{job.folder}: all {held_out} documents are held out; add text, or lower --val-fraction")
    raise DataError(
        f"{job.folder}: no text to train on in {len(job.inputs)} files, {progress.quarantined} lines skipped "
        "(quarantine.jsonl says why); check --text and --field"
    )


def _describe(spec: BuildSpec, vocabulary: Vocabulary, progress: BuildProgress) -> Dataset:
    return Dataset(
        fingerprint=progress.fingerprint,
        tokenizer_sha256=vocabulary.sha256,
        vocab_size=vocabulary.size,
        end_token=vocabulary.end,
        dtype=dtype_for(vocabulary.size),
        recipe=spec.described(),
        quarantined=progress.quarantined,
        train=progress.train,
        val=progress.val,
    )
