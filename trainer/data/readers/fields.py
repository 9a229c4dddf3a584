"""Which field of a record is its text, and which records are wanted: `--field meta.text --where 'lang=en'`."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from dryvine.trainer.data.config import DataError

_COMPARE: dict[str, Callable[[object, object], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">=": lambda a, b: a >= b,  # type: ignore[operator]
    "<=": lambda a, b: a <= b,  # type: ignore[operator]
    ">": lambda a, b: a > b,  # type: ignore[operator]
    "<": lambda a, b: a < b,  # type: ignore[operator]
}
_CONDITION = re.compile(r"\s*([^=!<>]+?)\s*(!=|>=|<=|=|<|>)\s*(.*?)\s*")


class Condition(NamedTuple):
    """`path` compared with a value; a record without the field, or with one of another type, does not meet it."""

    path: str
    sign: str
    value: object

    def holds(self, record: Mapping[str, object]) -> bool:
        try:
            return _COMPARE[self.sign](dig(record, self.path), self.value)
        except (ValueError, TypeError):
            return False


class Fields(NamedTuple):
    """`text` and the paths of conditions may lead into nested objects, by names with dots between."""

    text: str = "text"
    where: tuple[Condition, ...] = ()

    def wants(self, record: Mapping[str, object]) -> bool:
        return all(condition.holds(record) for condition in self.where)

    @property
    def columns(self) -> list[str]:
        """All paths that are read."""
        return list(dict.fromkeys([self.text, *(condition.path for condition in self.where)]))


def condition(text: str) -> Condition:
    """Read `PATH SIGN VALUE`; the value is JSON (3, true, "a b"), or else the word itself. Raises DataError."""
    found = _CONDITION.fullmatch(text)
    if not found:
        raise DataError(f"--where {text!r}: write FIELD=VALUE, or one of {' '.join(_COMPARE)} between them")
    path, sign, word = found.groups()
    try:
        return Condition(path, sign, json.loads(word))
    except ValueError:
        return Condition(path, sign, word)


def dig(record: Mapping[str, object], path: str) -> object:
    """The value at a path; a field whose own name contains the dots comes first. Raises ValueError if there is none."""
    if path in record:
        return record[path]
    head, _, rest = path.partition(".")
    inner = record.get(head)
    if not isinstance(inner, Mapping):
        raise ValueError(f"no field {path!r}")
    try:
        return dig(inner, rest)
    except ValueError:
        raise ValueError(f"no field {path!r}") from None
