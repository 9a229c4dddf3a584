"""Both splits of a run's data, opened before any process group exists: a missing dataset then costs no GPU time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dryvine.trainer.config import Config
from dryvine.trainer.data.blend import Blend, BlendPart
from dryvine.trainer.data.config import DataConfig, DataError
from dryvine.trainer.data.dataset import Dataset, SplitName
from dryvine.trainer.data.identity import UNKNOWN, DataIdentity, identify
from dryvine.trainer.data.megatron import MegatronTokens, megatron_prefix
from dryvine.trainer.data.prepare import prepare
from dryvine.trainer.data.shards import SPLITS
from dryvine.trainer.data.source import SequenceSource, TokenSource, TooShort
from dryvine.trainer.ramps import sequences_before


@dataclass(frozen=True)
class HeldOut:
    """The validation split of one source of a blend, and its share of the blend, of those that have such a split."""

    share: float
    source: TokenSource


@dataclass(frozen=True)
class Data:
    """`val` is the first source's validation split; a blend has one for each source in `held_out`, by label."""

    train: SequenceSource
    val: SequenceSource
    identity: DataIdentity = UNKNOWN
    held_out: Mapping[str, HeldOut] = field(default_factory=dict)


def open_data(config: Config) -> Data:
    """Open both splits of what `[data]` names; the embedded corpus is built first if need be. Raises DataError."""
    if config.data.blend:
        return _open_blend(config)
    folder = prepare(config.data)
    train, val = (_split(config, folder, split) for split in SPLITS)
    return Data(train, val, identify((train.packed, val.packed), _tokenizer_of(folder)))


def _split(config: Config, folder: Path, split: SplitName, stream: int = 0) -> TokenSource:
    # The next token of each position, and one more for each depth of multi-token prediction.
    extra, data = 1 + config.model.mtp_depth, config.data
    prefix = megatron_prefix(folder)
    source = MegatronTokens(prefix, split, data.validation_fraction, data.vocab_size) if prefix else folder
    return TokenSource(source, split, config.data.seq_len, extra, config.run.seed, stream)


def _open_blend(config: Config) -> Data:
    folders = [prepare(config.data, entry.source) for entry in config.data.blend]
    _check_tokenizers(config.data, folders)
    sources = [_split(config, folder, "train", stream) for stream, folder in enumerate(folders)]
    blend = Blend([BlendPart(entry, source) for entry, source in zip(config.data.blend, sources, strict=True)])
    blend.check_length(sequences_before(config.batch, config.data.seq_len, config.run.steps))
    found = [_held_out(config, folder, stream) for stream, folder in enumerate(folders)]
    shares = [share if source else 0.0 for share, source in zip(blend.shares(), found, strict=True)]
    held_out = {
        entry.label: HeldOut(share / sum(shares), source)
        for entry, share, source in zip(config.data.blend, shares, found, strict=True)
        if source
    }
    if not held_out:
        raise DataError("data.blend: no source holds out a whole sequence; build one with a larger --val-fraction")
    lines = [source.packed for source in (*sources, *found) if source]
    identity = identify(lines, next(filter(None, map(_tokenizer_of, folders)), None))
    return Data(blend, next(iter(held_out.values())).source, identity, held_out)


def _held_out(config: Config, folder: Path, stream: int) -> TokenSource | None:
    """The validation split of a source if it has a whole sequence; else None: a small source of a blend need not."""
    try:
        return _split(config, folder, "val", stream)
    except TooShort:
        return None


def _check_tokenizers(config: DataConfig, folders: list[Path]) -> None:
    """The same ids must mean the same text in every source: the model cannot tell, and would only train worse."""
    found = zip(config.blend, map(_tokenizer_of, folders), strict=True)
    known = [(entry, tokenizer) for entry, tokenizer in found if tokenizer]
    for entry, tokenizer in known[1:]:
        if tokenizer != known[0][1]:
            raise DataError(
                f"data.blend: {entry.label} and {known[0][0].label} have different tokenizers; build one of them "
                "again with --tokenizer and the tokenizer.json of the other"
            )


def _tokenizer_of(source: Path) -> str | None:
    """The hash of a source's tokenizer; None for Megatron's files, which do not name one."""
    return None if megatron_prefix(source) else Dataset.load(source).tokenizer_sha256
