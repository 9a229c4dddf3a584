"""A self-contained HTML page: headings, text, tables and pictures, for a laptop and for a phone.

It loads no script, font or image, so it can be mailed and opened without a network. Wide tables and pictures scroll by
themselves; the page never scrolls sideways.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--dim:#59636e;--bg:#f6f8fa;--panel:#fff;--line:#d0d7de;
--bad:#b42318;--good:#1a7f37}
@media(prefers-color-scheme:dark){:root{--ink:#f0f6fc;--dim:#9198a1;--bg:#010409;--panel:#0d1117;
--line:#30363d;--bad:#ff7b72;--good:#3fb950}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:24px 16px;background:var(--bg);color:var(--ink);
font:15px/1.5 Inter,'Segoe UI',Helvetica,Arial,sans-serif}
h1{font-size:22px;margin:0 0 6px}h2{font-size:17px;margin:26px 0 8px}p{margin:0 0 8px;color:var(--dim)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:16px 0}
.card{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:10px 14px}
.card b{display:block;font-size:20px}.card span{color:var(--dim);font-size:13px}
.wide{overflow-x:auto;background:var(--panel);border:1px solid var(--line);border-radius:10px;margin-bottom:14px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 14px;text-align:right;border-top:1px solid var(--line);white-space:nowrap}
tr:first-child>*{border-top:0}th{color:var(--dim);font-weight:500}td:first-child,th:first-child{text-align:left}
td.text,th.text{text-align:left;white-space:normal;min-width:260px}
pre{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:10px 14px;margin:0 0 14px;
white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,Menlo,Consolas,monospace}
.bad{color:var(--bad)}.good{color:var(--good)}
.wide.pic{background:#fff;padding:6px}.pic svg{display:block;width:100%;height:auto;min-width:560px}
@media(max-width:600px){body{font-size:14px}th,td{padding:5px 9px}
td:first-child,th:first-child{white-space:normal;min-width:130px}td.text,th.text{min-width:200px}}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document; `parts` are made by the functions below."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """`kind`: bad or good."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def quote(text: str) -> str:
    """Preformatted text."""
    return f"<pre>{escape(text)}</pre>"


def cards(figures: dict[str, str]) -> str:
    """The most important figures, each under its name."""
    made = (
        f"<div class=card><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in figures.items()
    )
    return f"<div class=cards>{''.join(made)}</div>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], text_last: bool = False) -> str:
    """`text_last`: the last column is prose."""
    titles = [f"<th>{escape(head)}</th>" for head in heads]
    if text_last:
        titles[-1] = f"<th class=text>{escape(heads[-1])}</th>"
    lines = [f"<tr>{''.join(titles)}</tr>"]
    for row in rows:
        cells = [f"<td>{escape(cell)}</td>" for cell in row]
        if text_last:
            cells[-1] = f"<td class=text>{escape(row[-1])}</td>"
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def picture(svg: str, says: str) -> str:
    """An SVG with a text alternative."""
    return f'<div class="wide pic" role="img" aria-label="{escape(says)}">{svg}</div>'
