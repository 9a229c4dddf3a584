"""Tables of rows by expert, by hand."""

from __future__ import annotations

import pytest
import torch

from dryvine.comm.dispatch.counts import DeviceCounts
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


@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 0, 0), (1, 1, 1), (128, 129, 0), (1000, 3, 77)])
def test_blocks_whose_counts_are_on_the_device_are_bounded(counts: tuple[int, ...]) -> None:
    """By none where there are no rows: kernels are not launched then."""
    known = ExpertGroups(counts, CPU).blocks
    bound = ExpertGroups(DeviceCounts(torch.tensor(counts), sum(counts)), CPU).blocks
    assert known <= bound <= known + len(counts)
    assert bool(bound) == bool(sum(counts))
