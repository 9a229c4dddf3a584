"""Tables of rows by expert, by hand."""

from __future__ import annotations

import torch

from dryvine.trainer.tensors.groups import ExpertGroups

CPU = torch.device("cpu")


def test_tables_by_hand() -> None:
    groups = ExpertGroups((130, 0, 128), CPU)
    ends, starts, blocks = groups.tables
    assert blocks.tolist() == [[0, 0, 130], [0, 128, 130], [2, 130, 258]]
    assert starts.tolist() == [0, 2, 2, 3]
    assert ends.tolist() == [130, 130, 258]


def test_no_count_moves_an_address() -> None:
    """Kernels are compiled and loaded anew for an address that is a multiple of 16, which waits for the device."""
    places = {
        tuple(table.storage_offset() % 4 for table in ExpertGroups(counts, CPU).tables)
        for counts in ((1, 1, 1), (1, 200, 1), (0, 0, 700), (300, 400, 500))
    }
    assert len(places) == 1
