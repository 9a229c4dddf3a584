"""Print as JSON, for each pattern in the arguments, the files that it matches with their texts, or the error."""

from __future__ import annotations

import json
import sys

from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.inputs import match_files


def found(pattern: str) -> object:
    try:
        return {file.name: file.path.read_text() for file in match_files([pattern])}
    except DataError as error:
        return str(error)


print(json.dumps([found(pattern) for pattern in sys.argv[1:]]))
