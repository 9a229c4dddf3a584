"""One self-contained page: a table of figures, then each timeline on one time scale; on hover, what each op needs.

Several schedules make a comparison; a simulated and a measured timeline of one make a diagnosis.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from typing import TypedDict

from dryvine.parallel.schedule.draw.style import NAMES
from dryvine.parallel.schedule.draw.svg import svg
from dryvine.parallel.schedule.notation import op_text
from dryvine.parallel.schedule.simulate import Timeline

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>TITLE</title>
<style>
:root{color-scheme:light dark;--ink:#1f2328;--dim:#59636e;--bg:#f6f8fa;--panel:#fff;--line:#d0d7de;--bar:#d2620d}
@media(prefers-color-scheme:dark){:root{--ink:#f0f6fc;--dim:#9198a1;--bg:#010409;--panel:#0d1117;--line:#30363d}}
body{margin:0;padding:28px;background:var(--bg);color:var(--ink);font:15px Inter,'Segoe UI',Helvetica,Arial,sans-serif}
h1{font-size:22px;margin:0 0 4px}p{color:var(--dim);margin:0 0 18px}
table{border-collapse:separate;border-spacing:0;background:var(--panel);border:1px solid var(--line);
border-radius:12px;margin-bottom:22px;font-variant-numeric:tabular-nums}
th,td{padding:9px 16px;text-align:right;border-top:1px solid var(--line)}tr:first-child>*{border-top:0}
th{color:var(--dim);font-weight:500}td:first-child,th:first-child{text-align:left}td:first-child{font-weight:600}
.best{font-weight:700}.bar{display:inline-block;width:110px;height:9px;margin-left:10px;border-radius:3px;
background:linear-gradient(90deg,var(--bar) var(--part),var(--line) 0)}
.pic{overflow-x:auto;margin-bottom:18px}.pic svg{max-width:100%;min-width:1000px;height:auto}
svg rect[id]{cursor:default}
svg rect[id]:hover,svg rect.lit{stroke:#e5484d;stroke-width:2.5}
#tip{position:fixed;display:none;pointer-events:none;max-width:380px;padding:9px 12px;border-radius:8px;
background:var(--ink);color:var(--bg);font-size:13px;line-height:1.5;white-space:pre-line;z-index:9}
</style></head><body><h1>TITLE</h1><p>NOTE</p>
TABLE
PICTURES
<div id="tip"></div>
<script>
const ops=OPS,tip=document.getElementById("tip");
const lit=(id,on)=>(ops[id]?.needs||[]).forEach(n=>document.getElementById(n)?.classList.toggle("lit",on));
const name=id=>id.slice(id.indexOf("-")+1);
document.addEventListener("mouseover",e=>{const id=e.target.id,op=ops[id];if(!op)return;lit(id,true);
tip.textContent=op.text+op.needs.map(n=>`\\nneeds ${name(n)}, rank ${ops[n].rank}, ended ${ops[n].end}`).join("");
tip.style.display="block"});
document.addEventListener("mousemove",e=>{
tip.style.left=Math.min(e.clientX+16,innerWidth-tip.offsetWidth-8)+"px";
tip.style.top=Math.min(e.clientY+16,innerHeight-tip.offsetHeight-8)+"px"});
document.addEventListener("mouseout",e=>{lit(e.target.id,false);tip.style.display="none"});
</script></body></html>
"""


def as_html(timelines: Sequence[Timeline], note: str = "") -> str:
    """The page. `note` is a line under the title, such as what the costs are or what was measured."""
    title = " against ".join(dict.fromkeys(escape(_name(timeline)) for timeline in timelines))
    pictures = [f'<div class="pic">{svg(t, timelines, f"t{i}-")}</div>' for i, t in enumerate(timelines)]
    ops = {key: hover for i, timeline in enumerate(timelines) for key, hover in _hovers(timeline, f"t{i}-")}
    parts = {"TITLE": title, "NOTE": escape(note), "TABLE": _table(timelines), "PICTURES": "\n".join(pictures)}
    page = _PAGE.replace("OPS", json.dumps(ops, separators=(",", ":")).replace("</", "<\\/"))
    for place, value in parts.items():
        page = page.replace(place, value)
    return page


def _name(timeline: Timeline) -> str:
    return f"{timeline.schedule.name}" + ("" if timeline.label == "simulated" else f" ({timeline.label})")


def _table(timelines: Sequence[Timeline]) -> str:
    heads = ("schedule", "span", "bubble of the worst rank", "chunks held", "forwards overlapped", "stages a rank")
    fastest = min(timeline.span for timeline in timelines)
    rows = [f"<tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>"]
    for timeline in timelines:
        fraction = timeline.bubble_fraction
        mark = ' class="best"' if timeline.span == fastest else ""
        rows.append(
            f"<tr><td>{escape(_name(timeline))}</td><td{mark}>{timeline.span:.5g}</td>"
            f'<td>{timeline.bubble:.4g} ({fraction:.1%})<span class="bar" style="--part:{fraction:.1%}"></span></td>'
            f"<td>{timeline.peak_activations}</td><td>{timeline.overlapped_share:.0%}</td>"
            f"<td>{timeline.params_per_rank}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


class _Hover(TypedDict):
    """What a hover shows of an op; `needs` are the ids of other rectangles of the picture."""

    text: str
    rank: int
    end: str
    needs: list[str]


def _hovers(timeline: Timeline, prefix: str) -> Iterator[tuple[str, _Hover]]:
    """Of each op, by the id of its rectangle."""
    for rank, row in enumerate(timeline.cells):
        for cell in row:
            for op in cell.slot:
                partners = [f" with {op_text(other)}" for other in cell.slot if other != op]
                name = f"{op_text(op)}{''.join(partners)}"
                what = f"{name}: {NAMES[op.kind]}, stage {op.stage}, microbatch {op.microbatch}"
                text = f"{what}\nrank {rank}, {cell.start:.5g} to {cell.end:.5g}"
                needs = [prefix + op_text(need) for need in timeline.schedule.needs(op)]
                yield prefix + op_text(op), {"text": text, "rank": rank, "end": f"{cell.end:.5g}", "needs": needs}
