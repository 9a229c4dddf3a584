"""The options of a SLURM job, checked for what SLURM would refuse or a shell would misread.

SLURM parses directives (`#SBATCH --name=value`), with quoting that differs between versions, so their values may only
have characters that need no quoting. Words that the shell parses, such as paths and overrides, may be anything and are
quoted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
ACCOUNT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@-]*")  # such as proj@h100, where a site has accounts by hardware
WORDS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+,:\[\]-]*")  # lists of words, and of nodes: gpu[01-16]
CONSTRAINT = re.compile(r"[A-Za-z0-9_(\[][A-Za-z0-9_.+,&|*:()\[\]-]*")  # such as [rack1|rack2] and (a&b)|c
PATH = re.compile(r"[A-Za-z0-9_./+-]+")
INTERFACES = re.compile(r"=?[A-Za-z0-9_][A-Za-z0-9_.,:-]*")
DEVICES = re.compile(r"\^?=?[A-Za-z0-9_][A-Za-z0-9_.,:-]*")  # of NCCL_IB_HCA: ^ all but these, = exact names
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
NO_LIMIT = ("unlimited", "infinite")  # SLURM's words for it, in any case
ARRAY_MOST = 10_000
KINDS = ("pyxis", "apptainer")


class JobError(ValueError):
    """An invalid option: which, why, and what to write instead."""


@dataclass(frozen=True)
class SlurmJob:
    """The options of one run's job. Empty strings and zeros leave the choice to SLURM."""

    nodes: int
    gpus_per_node: int
    name: str
    partition: str = ""
    account: str = ""
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    exclude: str = ""
    time: str = ""
    array: int = 0  # tasks that run one after the other, each going on from the last
    cpus_per_rank: int = 0
    interface: str = ""
    ib_hca: str = ""
    container: str = ""  # pyxis:IMAGE or apptainer:IMAGE
    mounts: str = ""
    per_rank: bool = False  # srun starts ranks; else one torchrun a node
    check: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in FORMS and value and not FORMS[field.name].fullmatch(value):
                raise JobError(
                    f"{_option(field.name)} {value!r}: such characters are not taken here; "
                    f"it must match {FORMS[field.name].pattern}"
                )
        self._sizes()
        if self.container and not self.image:
            raise JobError(f"--container {self.container!r}: write {' or '.join(f'{kind}:IMAGE' for kind in KINDS)}")
        if self.mounts and not self.container:
            raise JobError("--mounts is of a container: give --container too")
        if self.time:
            parse_time(self.time)

    def _sizes(self) -> None:
        limits: dict[str, Callable[[int], bool]] = {
            "nodes": lambda n: 1 <= n <= 65536,
            "gpus_per_node": lambda n: 1 <= n <= 1024,
            "array": lambda n: 0 <= n <= ARRAY_MOST,
            "cpus_per_rank": lambda n: 0 <= n <= 1024,
        }
        for name, fits in limits.items():
            if not fits(getattr(self, name)):
                raise JobError(f"{_option(name)} {getattr(self, name)}: no machine has so many")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def image(self) -> tuple[str, str] | None:
        """The kind of container and its image; None if there is none."""
        kind, _, image = self.container.partition(":")
        return (kind, image) if kind in KINDS and image else None


FORMS = {
    "name": WORD,
    "partition": WORDS,
    "account": ACCOUNT,
    "qos": WORD,
    "reservation": WORDS,
    "constraint": CONSTRAINT,
    "exclude": WORDS,
    "interface": INTERFACES,
    "ib_hca": DEVICES,
}


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def parse_time(time: str) -> int | None:
    """Seconds of SLURM's minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]; None for
    UNLIMITED, INFINITE and 0, which ask for no limit. Raises JobError."""
    if time.lower() in NO_LIMIT:
        return None
    found = TIME.fullmatch(time)
    if not found:
        raise JobError(
            f"--time {time!r}: write minutes, hours:minutes:seconds, days-hours:minutes:seconds or UNLIMITED"
        )
    first, second, third = (int(found[name] or 0) for name in ("first", "second", "third"))
    if found["days"] is not None:
        total = int(found["days"]) * 86400 + first * 3600 + second * 60 + third
    elif found["third"] is not None:
        total = first * 3600 + second * 60 + third
    else:
        total = first * 60 + second
    if total >= 2**31:
        raise JobError(f"--time {time!r}: that is {total} seconds; SLURM takes up to 68 years")
    return total or None


def log_path(folder: Path) -> str:
    """The path of the job's output for SLURM, with %j for its number. Raises JobError."""
    path = f"{folder}/slurm-%j.out"
    if not PATH.fullmatch(str(folder)):
        raise JobError(
            f"run.out and run.name: SLURM cannot write to {str(folder)!r}; use letters, digits and . _ - + /"
        )
    return path
