"""Files of the Hugging Face hub, fetched by its own library from a server that plays the hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.hub_server import COMMIT, REPO, hub_server

ON_HUB = {
    "top.jsonl": b"top",
    "README.md": b"read me",
    "en/a.jsonl": b"a",
    "en/part[1].txt": b"one",
    "en/old/b.jsonl": b"b",
    "en/old/copy of b.jsonl": b"b",
    "fr/\u00e9t\u00e9.jsonl": b"c",
}
# Those that need care come first: what an earlier one has fetched is in the cache for a later one.
ON_HUB_FOUND = {
    "en/*.jsonl": {"a.jsonl": "a"},
    "en/part[1].txt": {"part[1].txt": "one"},
    "**/*.jsonl": {"top.jsonl": "top", "en/a.jsonl": "a", "en/old/b.jsonl": "b", "fr/\u00e9t\u00e9.jsonl": "c"},
    "*.jsonl": {"top.jsonl": "top"},
    "en/**": {"a.jsonl": "a", "part[1].txt": "one", "old/b.jsonl": "b"},
    "[f]?/*": {"\u00e9t\u00e9.jsonl": "c"},
}


def on_hub(cache: Path, endpoint: str, *patterns: str, **more: str) -> list[dict[str, str] | str]:
    """What patterns match, in a process of its own: the library reads these settings when it is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"} | more
    command = [sys.executable, "-m", "tests.spawned.match_on_hub", *patterns]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True, timeout=120)
    answer: list[dict[str, str] | str] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_the_hub_is_read_by_its_own_library(tmp_path: Path) -> None:
    """From a server that plays the hub. Of its files only what matches is fetched, and once; two of the same content
    are one file in the library's cache, and one input."""
    pytest.importorskip("huggingface_hub")
    fetched: list[str] = []
    addresses = [f"hf://datasets/{REPO}/{pattern}" for pattern in ON_HUB_FOUND]
    lacking = [f"hf://datasets/{REPO}@gone/*.jsonl", f"hf://datasets/{REPO}/de/*.jsonl", "hf://datasets/someone"]
    with hub_server(ON_HUB, fetched) as endpoint:
        (first,) = on_hub(tmp_path / "first", endpoint, addresses[0])
        assert first == ON_HUB_FOUND["en/*.jsonl"]
        assert fetched == ["en/a.jsonl"]
        found = on_hub(tmp_path / "all", endpoint, *addresses, *lacking)
        assert len(fetched) == len(set(fetched)) + 1  # en/a.jsonl, in two caches
        pinned = on_hub(tmp_path / "all", endpoint, f"hf://datasets/{REPO}@{COMMIT}/en/*.jsonl")
    assert found[:-3] == list(ON_HUB_FOUND.values())
    gone, nothing, no_name = map(str, found[-3:])
    assert re.search(r"@gone/\*.jsonl': RevisionNotFoundError: 404.*$", gone)
    assert nothing.startswith(f"--text '{lacking[1]}': matches no file")
    assert "write hf://datasets/OWNER/NAME/PATTERN" in no_name
    assert pinned == [{"a.jsonl": "a"}]
    assert on_hub(tmp_path / "all", endpoint, addresses[0], HF_HUB_OFFLINE="1") == [first], "from the cache"
