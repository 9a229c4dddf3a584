"""The checker must find every way in which a schedule can be wrong, and say where."""

import dataclasses
import random

import pytest

from dryvine.parallel.schedule.check import check
from dryvine.parallel.schedule.grid import excerpt
from dryvine.parallel.schedule.ir import Op, Schedule
from dryvine.parallel.schedule.notation import from_csv, slot_text, to_csv
from dryvine.parallel.schedule.rules import ScheduleError
from dryvine.parallel.schedule.table import build, legal, load

GOOD = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


def broken(old: str, new: str, good: str = GOOD) -> str:
    assert old in good
    with pytest.raises(ScheduleError) as error:
        check(from_csv(good.replace(old, new, 1), "mine.csv"))
    return str(error.value)


def test_the_good_one_is_good():
    check(from_csv(GOOD))


def test_missing_forward():
    assert broken("0F0,0F1,0B0,0B1\n1F0,1B0", "0F0,0F1,0B0,0B1\n1B0").startswith(
        "mine.csv: rank 1, slot 0: 1F0 is missing"
    )


def test_missing_backward_and_half_backward():
    assert "0F1 has no backward; it needs 0B1, or 0I1 and 0W1" in broken("0B0,0B1\n", "0B0\n")
    assert "1F1 has 1I1; it needs" in broken("1F1,1B1", "1F1,1I1")


def test_twice_and_three_kinds():
    assert "0B0 runs twice, first on rank 0, slot 2" in broken("0B0,0B1", "0B0,0B0,0B1")
    assert "has 0B0 and 0I0 and 0W0" in broken("0B0,", "0B0,0I0,0W0,")


def test_wrong_rank():
    message = broken("0F0,0F1,0B0,0B1\n", "0F0,0F1,1B1,0B0,0B1\n", GOOD.replace(",1B1", ""))
    assert "rank 0, slot 2: 1B1 stands on the wrong rank; its stage is on rank 1" in message


def test_cyclic_wait_names_the_circle():
    message = broken("0F0,0F1,0B0,0B1\n1F0,1B0,1F1", "0F0,0B0,0F1,0B1\n1F0,1F1,1B0")
    assert "cyclic wait" in message
    assert "0B0 (rank 0, slot 1) waits for 1B0 (rank 1, slot 2)" in message
    assert "1F1 (rank 1, slot 1) waits for 0F1 (rank 0, slot 2)" in message


def test_weight_gradients_wait_for_their_inputs():
    assert "0W0 (rank 0, slot 2) waits for 0I0 (rank 0, slot 3)" in broken("0B0", "0W0,0I0")


def test_communicator_order_at_both_ends():
    crossed = "0F0,0F1,0B0,0B1\n1F1,1B1,1F0,1B0\n"
    with pytest.raises(ScheduleError, match=r"communicator order \(down, route 0\): stage 1 takes microbatch 1 next"):
        check(from_csv(crossed))


def test_the_grid_marks_the_slot():
    rows = broken("0B0,0B1\n", "0B0,0B0\n").splitlines()
    assert ">0B0<" in rows[2]
    assert [row.split("  ")[0] for row in rows[2:]] == ["rank 0", "rank 1"]


def test_the_grid_reaches_three_slots_and_ranks_each_way():
    grid = excerpt(build("gpipe", 9, 8), rank=4, column=5).splitlines()
    assert grid[0].split() == [str(column) for column in range(2, 9)]
    assert [row[:6] for row in grid[1:]] == [f"rank {rank}" for rank in range(1, 8)]
    assert grid[4].split()[2:] == ["4F2", "4F3", "4F4", ">4F5<", "4F6", "4F7", "4B0"]
    assert ">(nothing)<" in excerpt(build("gpipe", 1, 1), rank=0, column=2)


def test_unreadable_cells_say_row_and_cell():
    assert "mine.csv: row 2, cell 3: cannot read '1X1'" in broken("1F1", "1X1")
    assert "cannot read '(0F1;0B0)OVERLAP_F_F'" in broken("0F1,0B0", "(0F1;0B0)OVERLAP_F_F")
    assert "no op found" in broken(GOOD, "\n")


def test_a_pair_must_be_of_different_microbatches():
    assert "is neither one op nor two ops of different microbatches" in broken("1F1,1B1", "(1F1;1B1)OVERLAP_F_B")


def test_blanks_and_spaces_are_nothing():
    assert from_csv(GOOD.replace("0F1,", " ,0F1 ,,")) == from_csv(GOOD)


def test_any_pair_round_trips():
    """A searched schedule may pair any two kinds; the text must carry them and find the routes again."""
    base = build("dualpipe", 4, 8)
    flipped = dataclasses.replace(base, ranks=tuple(tuple(slot[::-1] for slot in row) for row in base.ranks))
    assert from_csv(to_csv(flipped), "dualpipe") == flipped
    for kinds in ("FF", "FI", "FW", "IW", "BB", "BI", "II", "WW"):
        slot = (Op(kinds[0], 1, 0), Op(kinds[1], 1, 3))
        text = slot_text(slot)
        assert text == f"(1{kinds[0]}0;1{kinds[1]}3)OVERLAP_{kinds[0]}_{kinds[1]}"
        row = from_csv(f"0F0,0F3\n{text}\n").ranks[1]
        assert row == (slot,)


def test_routes_of_no_named_layout_are_read_off_the_rows():
    routes = ((0, 2, 1),)
    slots = [tuple((Op(kind, stage, 0),) for kind in "FB") for stage in (0, 2, 1)]
    odd = Schedule("odd", 1, routes, tuple(slots))
    check(odd)
    assert from_csv(to_csv(odd), "odd") == odd


def test_no_single_change_goes_unseen():
    """Drop, double or misplace any op of real schedules: the checker, or at worst a changed meaning, must show it."""
    rng = random.Random(0)
    for name in ("dualpipe", "zbv", "interleaved"):
        good = build(name, 4, 8)
        for _ in range(60):
            rows = [list(row) for row in good.ranks]
            rank = rng.randrange(4)
            slot = rows[rank].pop(rng.randrange(len(rows[rank])))
            if rng.random() < 0.5:
                rows[(rank + 1) % 4].insert(rng.randrange(8), slot)
            with pytest.raises(ScheduleError):
                check(dataclasses.replace(good, ranks=tuple(map(tuple, rows))))


def test_files_by_name(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(to_csv(build("dualpipe", 4, 8)))
    name = f"file:{path}"
    assert legal(name, 4, 8) is None
    assert build(name, 4, 8).routes == build("dualpipe", 4, 8).routes
    assert "is for 4 ranks and 8 microbatches, not 2 and 8; set pp=4" in str(legal(name, 2, 8))
    assert "No such file" in str(legal("file:/nowhere.csv", 4, 8))
    with pytest.raises(ScheduleError, match="no schedule is called 'dualpip'"):
        build("dualpip", 4, 8)
    path.write_text(to_csv(load(str(path))).replace("0F0,", "", 1))
    assert "0F0 is missing" in str(legal(name, 4, 8))
