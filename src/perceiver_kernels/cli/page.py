"""A result of `bench` as one self-contained HTML page: text, tables and SVG, no script, nothing to load."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from perceiver_kernels.cli.charts import KINDS, units
from perceiver_kernels.cli.report import Result, seconds
from perceiver_kernels.cli.tables import Row, cells, left_out, measured, problems

PITCH, BAR = 46, 9  # height of a candidate's line in a chart, and of its bar, in CSS pixels

STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #63636b; --line: #e3e3e6; --page: #fff;
  --track: #f1f1f3; --ours: #2166ac; --peer: #a9a9b1; --bad: #b2182b; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --soft: #a0a0aa; --line: #35353b;
  --page: #17171a; --track: #232328; --ours: #5aa2dc; --peer: #71717b; --bad: #ef8a7a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 3rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; }
h1 { font-size: 1.7rem; font-weight: 650; letter-spacing: -.02em; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; font-weight: 650; margin: 3rem 0 .2rem; padding-top: 1.1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .6rem; }
p { margin: .3rem 0 .6rem; max-width: 46rem; }
.soft, dt { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr));
  gap: 1.8rem 3rem; margin: 1.4rem 0; }
figure { margin: 0; }
svg { display: block; width: 100%; overflow: visible; font-size: 13px; }
svg text { fill: var(--ink); } svg .soft { fill: var(--soft); font-size: 11px; }
.backend { fill: var(--ours); } .peer { fill: var(--peer); } .track { fill: var(--track); }
svg text.ours { fill: var(--ours); font-weight: 650; }
.whisker { stroke: var(--ink); } .limit { stroke: var(--soft); stroke-dasharray: 2 2; }
.scroll { overflow-x: auto; margin: .6rem 0 1.4rem; }
table { border-collapse: collapse; font-size: 13px; width: 100%; white-space: nowrap; }
th { font-weight: 500; color: var(--soft); }
tbody th { padding-top: 1rem; color: var(--ink); font-weight: 600; }
th, td { text-align: right; padding: .32rem 0 .32rem 1.1rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.ours { color: var(--ours); font-weight: 600; } td.bad { color: var(--bad); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.4rem; margin: 1rem 0; }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media print { body { padding: 0; } figure, tr { break-inside: avoid; } .scroll { overflow: visible; } }
"""

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
"""


def write(result: Result, path: Path) -> None:
    """Write the page of a `bench` result (what its --json holds), making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(result), encoding="utf-8")


def render(result: Result) -> str:
    """The page's HTML: the outcome in one table, each shape's charts and figures, the machine, the method."""
    title, where = "perceiver_kernels: attention benchmark", result["machine"]
    card = where["gpu"]["name"] if result.get("device", "cpu") != "cpu" else None
    machine = card or f"{where['cpu']}, {where['threads']} threads, {where['isa'] or 'no compiled library'}"
    day = f"torch {where['torch']} · {result['date'][:10]}"
    shapes: dict[str, list[list[Row]]] = {}
    for (case, shape, *_), group in problems(result["rows"]).items():
        shapes.setdefault(f"{case}: {shape}", []).append(group)
    parts = [
        HEAD.format(title=title, style=STYLE),
        f"<h1>{title}</h1>",
        f'<p class="soft">{escape(f"{machine} · {day}")}</p>',
        "<p>Causal cross-attention of M queries onto N keys, as one call: the backends of this package, and",
        "what PyTorch offers without it, on the same tensors in the same run.</p>",
        glance(shapes),
    ]
    for shape, groups in shapes.items():
        parts += [f'<h2>{escape(shape)}</h2>\n<div class="charts">']
        parts += [chart(group) for group in groups if measured(group)]
        parts += ["</div>", figures(groups)]
    return "\n".join([*parts, provenance(result), METHOD, "</body>\n</html>\n"])


def heading(row: Row) -> str:
    """Dtype and pass."""
    return f"{row['dtype']}, {KINDS[row['pass']]}"


def cell(text: str, look: str = "") -> str:
    """One cell of a table."""
    return f'<td class="{look}">{escape(text)}</td>' if look else f"<td>{escape(text)}</td>"


def table(headings: Iterable[str], groups: dict[str, list[str]]) -> str:
    """A table that scrolls sideways where it's too wide; under the name of each group its rows' cells."""
    names = [escape(name) for name in headings]
    lines = [f"<thead><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr></thead>"]
    for group, rows in groups.items():
        lines += [f'<tbody><tr><th colspan="{len(names)}">{escape(group)}</th></tr>']
        lines += [*(f"<tr>{row}</tr>" for row in rows), "</tbody>"]
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


def glance(shapes: dict[str, list[list[Row]]]) -> str:
    """One line for each problem: the fastest of this package's backends beside the fastest of the others."""
    lines: dict[str, list[str]] = {}
    for shape, groups in shapes.items():
        for group in groups:
            fastest: dict[str, Row] = {}
            for row in sorted(measured(group), key=lambda row: float(row["median_s"])):
                fastest.setdefault(row["kind"], row)
            if len(fastest) == 2:
                both = fastest["backend"], fastest["peer"]
                times = [cell(f"{seconds(row['median_s'])} ({row['candidate']})") for row in both]
                ratio = cell(f"{both[1]['median_s'] / both[0]['median_s']:.2f}x", "ours")
                lines.setdefault(shape, []).append("".join([cell(heading(both[0])), *times, ratio]))
    headings = ("", "this package, fastest", "others, fastest", "speed-up")
    return "<h2>At a glance</h2>\n" + table(headings, lines) if lines else ""


def chart(group: list[Row]) -> str:
    """Bars of one problem: each candidate's rate and its quartiles, and the machine's own limit as a line."""
    rows = measured(group)
    unit, field, scale, limit, limit_name = axis(rows[0])
    highest = [row[field] * scale * row["median_s"] / row["q1_s"] for row in rows]
    full = max(limit or 0.0, *highest)
    marks = []
    for i, row in enumerate(rows):
        rate, y = row[field] * scale, PITCH * i
        at = {
            key: f"{100 * rate * row['median_s'] / row[key] / full:.2f}%"
            for key in ("q3_s", "median_s", "q1_s")
        }
        label = f"{figure(rate)} {unit} · {seconds(row['median_s'])}"
        label += "" if row["speedup"] is None else f" · {row['speedup']:.2f}x"
        name = f'<text y="{y + 14}" class="{"ours" if row["kind"] == "backend" else ""}">'
        marks += [
            f"{name}{escape(row['candidate'])}</text>",
            f'<text x="100%" y="{y + 14}" text-anchor="end">{label}</text>',
            f'<rect class="track" y="{y + 21}" width="100%" height="{BAR}"/>',
            f'<rect class="{row["kind"]}" y="{y + 21}" width="{at["median_s"]}" height="{BAR}"/>',
            line("whisker", at["q3_s"], y + 21 + BAR / 2, at["q1_s"], y + 21 + BAR / 2),
        ]
        if limit is not None:
            end = f"{100 * limit / full:.2f}%"
            marks.append(line("limit", end, y + 18, end, y + 24 + BAR))
    if limit is not None:
        text = f"{limit_name}: {figure(limit)} {unit}"
        marks.append(
            f'<text class="soft" x="{end}" y="{PITCH * len(rows) + 2}" text-anchor="end">{text}</text>'
        )
    name = escape(f"{heading(rows[0])}: {unit} of each candidate")
    svg = f'<svg role="img" aria-label="{name}" height="{PITCH * len(rows) + 6}">'
    return "\n".join([f"<figure><h3>{heading(rows[0])}</h3>", svg, *marks, "</svg></figure>"])


def axis(row: Row) -> tuple[str, str, float, float | None, str]:
    """A problem's unit, the field it's read from, the factor on that, and the machine's limit with its name.

    One query alone (decode) is a matter of memory bandwidth, anything else of arithmetic.
    """
    if " M1 " in row["shape"] and row["kv_gb_per_s"]:
        return "GB/s", "kv_gb_per_s", 1.0, row["read_gb_per_s"], "reading alone"
    unit, scale, name = units(row)
    limit = row["peak_gflops"]
    return unit, "gflops", scale, None if limit is None else limit * scale, name


def figure(rate: float) -> str:
    """Three digits, or all before the point."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def line(look: str, x1: str, y1: float, x2: str, y2: float) -> str:
    """An SVG line."""
    return f'<line class="{look}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def figures(groups: list[list[Row]]) -> str:
    """The table of one shape, and what was left out of it."""
    lines: dict[str, list[str]] = {}
    headings: list[str] = []
    notes = []
    for group in groups:
        for row in measured(group):
            texts = cells(row)
            headings = ["", *list(texts)[1:]]
            looks = {"candidate": "ours" * (row["kind"] == "backend")}
            looks["error/budget"] = "bad" * (not row["within_budget"])
            cut = [cell(text, looks.get(name, "")) for name, text in texts.items()]
            lines.setdefault(heading(row), []).append("".join(cut))
        for name, why in left_out(group).items():
            text = f"{heading(group[0])}: {name} is left out: {why}"
            notes.append(f'<p class="soft">{escape(text)}</p>')
    return "\n".join([table(headings, lines) if lines else "", *notes])


def provenance(result: Result) -> str:
    """Machine, software, commit, command and date."""
    where: dict[str, Any] = result["machine"]
    gpu = where["gpu"]
    facts = {
        "Processor": f"{where['cpu']} ({where['arch']}), {where['cores']} cores",
        "Threads": str(where["threads"]),
        "Instruction set": where["isa"] or "no compiled library",
        "Memory": f"{where['memory_gb']} GB",
        "GPU": f"{gpu['name']}, {gpu['sms']} SMs, driver {gpu['driver']}" if gpu else "none",
        "System": f"{where['system']}, Python {where['python']}",
        "Package": f"perceiver_kernels {result['version']}",
        "Commit": result["commit"] or "unknown: an installed copy",
        "Libraries": f"torch {where['torch']}, triton {where['triton'] or 'not installed'}",
        "Date": result["date"],
        "Command": result["command"],
    }
    lines = "\n".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    cut = (
        "<p>The run was interrupted: this is what had been measured.</p>" if result.get("interrupted") else ""
    )
    return f"<h2>Where this was measured</h2>\n{cut}<dl>\n{lines}\n</dl>"


METHOD = """<h2>How to read it</h2>
<p><b>Speed-ups</b> in charts and tables are over torch's <code>scaled_dot_product_attention</code>
(torch-sdpa) with the fastest way of passing the mask. Bars are medians, the thin lines on them span the
quartiles.</p>
<p><b>Interleaved:</b> every round takes one sample of each candidate, so that a drifting clock hits all
alike. Compare within this page, not between pages.</p>
<p><b>Checked first:</b> results are compared with float64 before they are timed. A backend over its error
budget (1.5 times the error of plain matrix products in the same dtype) isn't timed; torch's own are, their
error in red.</p>
<p><b>GFLOP/s</b> counts multiplications and additions for visible pairs of query and key alone. <b>Of
peak</b> is the share of a loop of multiply-adds in registers (on a GPU: of a large matrix product). With
one query it is memory that counts: <b>GB/s</b> are bytes of keys and values, <b>of read</b> their share of
plainly reading memory. Both limits are measured in the same run.</p>
<p><b>Peak MiB</b> is what one call adds to the memory of the process at its highest, outputs included.</p>"""
