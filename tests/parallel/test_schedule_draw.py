"""Pictures: goldens to be read in diffs, and formats that their readers can open."""

import csv
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dryvine.launch.schedule_cli import schedule as command
from dryvine.parallel.schedule.costs import Costs
from dryvine.parallel.schedule.draw.formats import FORMATS
from dryvine.parallel.schedule.draw.html import as_html
from dryvine.parallel.schedule.draw.json import as_json
from dryvine.parallel.schedule.draw.style import HUES, fill, hue_names, hues, ink, label, passes
from dryvine.parallel.schedule.draw.svg import svg
from dryvine.parallel.schedule.draw.text import lines, text
from dryvine.parallel.schedule.draw.trace import as_trace
from dryvine.parallel.schedule.ir import Op
from dryvine.parallel.schedule.notation import from_csv
from dryvine.parallel.schedule.search.search import Effort, Found, Problem
from dryvine.parallel.schedule.simulate import Timeline, simulate
from dryvine.parallel.schedule.table import build

SVG = "{http://www.w3.org/2000/svg}"
GOLDEN = Path(__file__).parents[1] / "golden"
app = typer.Typer()
app.command()(command)


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def lopsided() -> Timeline:
    """Two ranks that idle for 2 and 3 of 8."""
    return simulate(from_csv("0F0,0F1,0B0,0B1\n1F0,(1F1;1B0)OVERLAP_F_B,1B1\n"), Costs(pairs={"BF": 2}))


@pytest.mark.parametrize(("name", "pp", "microbatches"), [("dualpipe", 8, 20), ("zbv", 4, 10)])
def test_golden(name, pp, microbatches):
    drawn = text(simulate(build(name, pp, microbatches)), width=160)
    assert drawn == (GOLDEN / f"{name}-{pp}x{microbatches}.txt").read_text()


def test_text_keeps_to_its_width_and_loses_nothing():
    timeline = simulate(build("dualpipev", 4, 9), Costs(F=1, I=1.3, W=0.8, P2P=0.1, comm=1 / 3))
    whole = text(timeline, width=10_000)
    wrapped = lines(timeline, width=80)
    assert all(len("".join(p.text for p in line)) <= 80 for line in wrapped[1:-1])
    rank = "".join("".join(p.text for p in line[1:]) for line in wrapped if line and line[0].text.startswith("rank 2"))
    assert f"rank 2 {rank}" in whole
    assert all(rank.count(f"F{m}{half}") == 1 for m in range(9) for half in "ab")


def test_svg_draws_every_op_once_inside_its_panel():
    schedule = build("dualpipe", 4, 8)
    root = ET.fromstring(svg(simulate(schedule), prefix="t0-"))
    width = float(root.attrib["width"])
    rects = [e for e in root.iter(f"{SVG}rect") if "id" in e.attrib]
    assert len(rects) == sum(1 for rank in range(4) for _ in schedule.ops(rank)) == len({r.attrib["id"] for r in rects})
    assert all(float(r.attrib["x"]) > 0 and float(r.attrib["x"]) + float(r.attrib["width"]) < width for r in rects)
    assert {r.attrib["class"] for r in rects} == {f"{kind}{hue}" for kind in "FBIW" for hue in (0, 1)}


def test_svg_draws_each_op_on_its_ranks_track_at_its_time():
    """0F0 above 1F0 of a later start; a pair is two halves of one cell."""
    timeline = lopsided()
    rects = list(ET.fromstring(svg(timeline, prefix="t-")).iter(f"{SVG}rect"))
    ops = {r.attrib["id"].removeprefix("t-"): r for r in rects if "id" in r.attrib}
    tracks = [r for r in rects if r.attrib.get("class") == "track"]

    def number(name: str, key: str) -> float:
        return float(ops[name].attrib[key])

    for rank, track in enumerate(tracks):
        top, left = float(track.attrib["y"]), float(track.attrib["x"])
        unit = float(track.attrib["width"]) / timeline.span
        for cell in timeline.cells[rank]:
            for part, name in enumerate(f"{op.stage}{op.kind}{op.microbatch}" for op in cell.slot):
                height = float(track.attrib["height"]) / len(cell.slot)
                assert number(name, "y") == pytest.approx(top + part * height)
                assert number(name, "x") == pytest.approx(left + cell.start * unit, abs=0.01)
                assert number(name, "width") == pytest.approx((cell.end - cell.start) * unit - 1, abs=0.02)
                assert ops[name].attrib["class"][0] == name[1]
    assert len(tracks) == 2
    assert len(ops) == 8


def test_json_has_the_figures():
    found = json.loads(run("dualpipe", "--pp", "8", "--microbatches", "20", "--format", "json").stdout)
    expected = {"span": 66, "bubble": 6, "bubble_fraction": 6 / 66, "peak_activations": 9, "params_per_rank": 2}
    assert {key: found[key] for key in expected} == expected
    assert found["overlapped_share"] == pytest.approx(82 / 160)
    assert [row["rank"] for row in found["ranks"]] == list(range(8))
    assert found["ranks"][0]["slots"][0] == {"slot": "0F0", "start": 0.0, "end": 1.0}


def test_json_has_the_figures_of_each_rank():
    """1F1B holds fewer the later the rank; at F = 1, B = 2 every rank idles for 2 (F + B)."""
    found = json.loads(as_json([lopsided()]))["ranks"]
    assert [rank["idle"] for rank in found] == [2, 3]
    assert found[1]["slots"][1] == {"slot": "(1F1;1B0)OVERLAP_F_B", "start": 2, "end": 4}
    found = json.loads(as_json([simulate(build("one_f_one_b", 3, 4))]))["ranks"]
    assert [(rank["peak_activations"], rank["stages"], rank["idle"]) for rank in found] == [
        (3, [0], 6),
        (2, [1], 6),
        (1, [2], 6),
    ]
    assert [json.loads(as_json([lopsided()] * 2))[i]["span"] for i in (0, 1)] == [8, 8]


def test_trace_has_each_slot_on_its_rank_at_its_time():
    events = json.loads(as_trace([lopsided()]))["traceEvents"]
    slots = [(e["tid"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert slots == [
        (0, "F0", 0, 1000),
        (0, "F1", 1000, 1000),
        (0, "B0", 4000, 2000),
        (0, "B1", 6000, 2000),
        (1, "F0", 1000, 1000),
        (1, "F1 & B0", 2000, 2000),
        (1, "B1", 4000, 2000),
    ]
    assert [e["args"]["name"] for e in events if e["name"] == "thread_name"] == ["rank 0", "rank 1"]


def test_html_table_and_hover_by_hand():
    slow = simulate(lopsided().schedule, Costs(pairs={"BF": 3}))
    page = as_html([lopsided(), slow], "a note")
    rows = [re.findall(r"<td[^>]*>([^<]*)", row) for row in page.split("<table>")[1].split("<tr>")[2:]]
    assert rows == [["file", "8", "3 (37.5%)", "2", "25%", "1"], ["file", "9", "3 (33.3%)", "2", "25%", "1"]]
    assert re.findall(r'<td class="best">([^<]*)', page) == ["8"]
    ops = json.loads(re.search(r"const ops=(\{.*?\}),tip=", page)[1])
    assert ops["t0-1B0"] == {
        "text": "1B0 with 1F1: backward, stage 1, microbatch 0\nrank 1, 2 to 4",
        "rank": 1,
        "end": "4",
        "needs": ["t0-1F0"],
    }
    assert ops["t1-1B0"]["end"] == "5"
    assert "<p>a note</p>" in page


def test_pictures_on_one_page_share_a_scale_and_their_axes_fit_the_cells():
    slow = simulate(lopsided().schedule, Costs(F=20, I=20, W=20, pairs={"BF": 40}))
    pictures = [ET.fromstring(svg(t, [lopsided(), slow], "t-")) for t in (lopsided(), slow)]
    for root, timeline in zip(pictures, (lopsided(), slow), strict=True):
        (track, *_) = (r for r in root.iter(f"{SVG}rect") if r.attrib.get("class") == "track")
        left, unit = float(track.attrib["x"]), float(track.attrib["width"]) / slow.span  # of the longer one in both
        last = next(r for r in root.iter(f"{SVG}rect") if r.attrib.get("id") == "t-0B1")
        assert float(last.attrib["x"]) == pytest.approx(left + timeline.cells[0][3].start * unit, abs=0.01)
        ticks = [t for t in root.iter(f"{SVG}text") if t.attrib["class"] == "dim time"]
        assert [float(t.text) for t in ticks] == list(range(0, 161, 10))
        assert all(float(t.attrib["x"]) == pytest.approx(left + float(t.text) * unit, abs=0.01) for t in ticks)


def test_colours_carry_the_kind_and_hues_the_direction():
    hue = HUES[1]
    assert [fill(kind, 1) for kind in "WFIB"] == [hue.weight, hue.forward, hue.inputs, hue.backward]
    assert [ink(kind) == "#ffffff" for kind in "WFIB"] == [False, False, True, True]
    dualpipe, vee, loop = build("dualpipe", 4, 8), build("zbv", 4, 8), build("interleaved", 2, 4, 3)
    assert hue_names(build("one_f_one_b", 4, 8)) == [""]
    assert hue_names(dualpipe) == ["ranks 0 \N{RIGHTWARDS ARROW} 3", "ranks 3 \N{RIGHTWARDS ARROW} 0"]
    assert hue_names(vee) == ["stages 0\N{EN DASH}3", "stages 4\N{EN DASH}7"]
    assert hue_names(loop) == ["stages 0\N{EN DASH}1", "stages 2\N{EN DASH}3", "stages 4\N{EN DASH}5"]
    assert [hues(vee)[0, stage] for stage in (0, 3, 4, 7)] == [0, 0, 1, 1]
    assert [label(Op("B", stage, 12), passes(vee)) for stage in (0, 7)] == ["B12a", "B12b"]
    assert label(Op("F", 2, 3, 1), passes(dualpipe)) == "F3"


def test_trace_is_chromes():
    events = json.loads(run("zb1p", "dualpipe", "--pp", "4", "--microbatches", "8", "--format", "trace").stdout)
    slices = [e for e in events["traceEvents"] if e["ph"] == "X"]
    assert {e["pid"] for e in slices} == {0, 1}
    assert all(e["dur"] > 0 and {"ts", "tid", "name"} <= e.keys() for e in slices)


def test_html_stands_alone_and_compares():
    page = run("dualpipe", "dualpipev", "1f1b", "--pp", "4", "--microbatches", "8", "--format", "html").stdout
    assert not re.findall(r"(?:src|href)=|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert page.count("<svg ") == 3
    ops = json.loads(re.search(r"const ops=(\{.*?\}),tip=", page)[1])
    assert set(re.findall(r' id="(t\d-[^"]+)"', page)) == ops.keys()
    assert ops["t0-2B5"]["needs"] == ["t0-2F5", "t0-3B5"]
    assert "needs" in ops["t1-0F0"]
    spans = re.findall(r"<tr><td>\w+</td><td[^>]*>([\d.]+)</td>", page)
    assert spans == ["26", "27", "33"]  # one model for all: a V's stages are half as long


def test_chunks_of_a_comparison_are_for_those_that_take_a_choice():
    sizes = ("--pp", "4", "--microbatches", "8", "--format", "json")
    found = json.loads(run("interleaved", "dualpipe", "zbv", "--chunks", "3", *sizes).stdout)
    assert [(each["name"], each["stages"]) for each in found] == [("interleaved", 12), ("dualpipe", 4), ("zbv", 8)]
    alone = run("dualpipe", "--chunks", "3", *sizes)
    assert (alone.exit_code, "cannot run pp=4, microbatches=8, chunks=3" in alone.stderr) == (2, True)


def test_search_asks_for_what_the_options_say_and_is_shown_first(monkeypatch):
    asked = []

    def fake(problem, effort):
        asked.append((problem, effort))
        return Found(lopsided(), simulate(build("gpipe", 2, 2)), 7.5)

    monkeypatch.setattr("dryvine.launch.schedule_cli.search", fake)
    options = ("--memory", "6", "--steps", "700", "--exact", "1.5", "--costs", "W=0.5", "--format", "json")
    result = run("dualpipe", "search", "--pp", "4", "--microbatches", "8", *options)
    assert asked == [(Problem(4, 8, Costs(W=0.5), 6), Effort(700, exact_seconds=1.5))]
    assert [each["name"] for each in json.loads(result.stdout)] == ["file", "dualpipe"]
    assert result.stderr == "search: span 8 (gpipe 9), bound 7.5\n"


def test_csv_out_and_in_again(tmp_path):
    path = tmp_path / "made" / "mine.csv"
    assert run("dualpipe", "--pp", "4", "--microbatches", "8", "--format", "csv", "--out", str(path)).exit_code == 0
    assert len(list(csv.reader(io.StringIO(path.read_text())))) == 4
    again = run("--file", str(path), "--format", "json")
    assert json.loads(again.stdout)["span"] == simulate(build("dualpipe", 4, 8)).span
    path.write_text(path.read_text().replace("3W4", "3W5", 1))
    bad = run("--file", str(path))
    assert bad.exit_code == 2
    assert "mine.csv: rank 0, slot 3: 3F4 has 3I4; it needs 3B4, or 3I4 and 3W4" in bad.stderr
    assert "Traceback" not in bad.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["dualpipe", "--pp", "3", "--microbatches", "8"], "nearest legal: pp=2 or pp=4"),
        (["dualpipe", "--pp", "4"], "needs --pp and --microbatches"),
        ([], "name a schedule"),
        (["dualpipe", "--pp", "4", "--microbatches", "8", "--format", "png"], "no format is called 'png'"),
        (["dualpipe", "zbv", "--pp", "4", "--microbatches", "8", "--format", "svg"], "shows one schedule"),
        (["--file", "/nowhere.csv"], "No such file"),
    ],
)
def test_wrong_requests_get_one_line_and_exit_2(arguments, says):
    result = run(*arguments)
    assert (result.exit_code, says in result.stderr, result.stderr.count("\n")) == (2, True, 1)


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_every_format_draws_every_schedule(form):
    for name in ("gpipe", "interleaved", "dualpipe"):
        assert FORMATS[form]([simulate(build(name, 2, 4))])


def test_no_torch_on_the_way():
    code = "import sys, dryvine.launch.schedule_cli, dryvine.parallel.schedule.draw.formats\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
