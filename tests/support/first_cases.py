"""A pytest plugin (`-p tests.support.first_cases`) that keeps the first case of each test and drops the others."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first = {item.nodeid.split("[")[0]: item for item in reversed(items)}
    dropped = [item for item in items if first[item.nodeid.split("[")[0]] is not item]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]
