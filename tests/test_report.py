"""`perceiver-kernels bench --report`: what the page says, and how a browser lays it out."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import DEVICE

from perceiver_kernels.cli import main, page
from perceiver_kernels.cli.tables import cells, problems

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

# Runs inside a copy of the page, and leaves what it found in an element of its own.
PROBE = """<pre id="probe"></pre><script>
const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 0.5 &&
  Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.5;
const found = {width: innerWidth, page: document.documentElement.scrollWidth, charts: [], trouble: [],
  loaded: performance.getEntriesByType("resource").length};
for (const svg of document.querySelectorAll("svg")) {
  const frame = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")];
  texts.forEach((text, i) => {
    const box = text.getBoundingClientRect();
    if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1)
      found.trouble.push(text.textContent + " leaves its chart");
    for (const other of texts.slice(i + 1))
      if (overlap(box, other.getBoundingClientRect()))
        found.trouble.push(text.textContent + " lies over " + other.textContent);
  });
  const bars = [...svg.querySelectorAll(".backend, .peer")];
  found.charts.push(bars.map(bar => bar.getBoundingClientRect().width / frame.width));
}
document.getElementById("probe").textContent = JSON.stringify(found);
</script></body>"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The page and the result of a short run: one shape with many queries, one with a single one."""
    folder = tmp_path_factory.mktemp("report")
    files = ["--json", str(folder / "b.json"), "--report", str(folder / "new" / "b.html")]
    shape = ["--case", "train", "decode", "--heads", "2", "--keys", "512", "--dim", "8", "--repeat", "2"]
    names = ["--backends", "reference", "torch-sdpa", "torch-eager", "--dtype", "float32", "--no-memory"]
    assert main(["bench", *shape, *names, *files, "--device", DEVICE.type]) == 0
    return (folder / "new" / "b.html").read_text(encoding="utf-8"), json.loads(
        (folder / "b.json").read_text()
    )


def test_everything_measured_stands_in_the_page(written: tuple[str, dict[str, Any]]) -> None:
    text, result = written
    for row in result["rows"]:
        assert all(html.escape(figure) in text for figure in cells(row).values())
    for fact in (result["command"], result["date"], result["machine"]["cpu"], result["machine"]["torch"]):
        assert html.escape(fact) in text
    assert text.count("<svg") == len(problems(result["rows"])) == 4
    decoded = [row for row in result["rows"] if row["case"] == "decode*" and row["pass"] == "fwd"]
    assert text.count("GB/s ·") == len(decoded) == 3


def test_the_page_needs_nothing_else(written: tuple[str, dict[str, Any]]) -> None:
    assert not re.search(r"<script|<link|<img|url\(|src=|href=|@import", written[0])
    assert "default-src 'none'" in written[0]


def test_text_from_outside_is_escaped(written: tuple[str, dict[str, Any]]) -> None:
    _, result = written
    row = {**result["rows"][0], "candidate": "<b>", "way": "&", "case": "<i>", "within_budget": False}
    lost = {**row, "candidate": "gone", "skipped": "a < b"}
    del lost["median_s"]
    changed = {**result, "rows": [row, lost], "command": "<script>", "interrupted": True}
    text = page.render(changed)
    assert not re.search("<b> |<i>|<script>", text)
    for part in ("&lt;b&gt; (&amp;)", "gone is left out: a &lt; b", 'class="bad"', "The run was interrupted"):
        assert part in text
    assert "At a glance" not in text  # there is nothing to compare with
    assert "<svg" not in page.render({**changed, "rows": [lost]})


@pytest.mark.skipif(BROWSER is None, reason=f"no browser here: none of {', '.join(BROWSERS)}")
@pytest.mark.parametrize("width", [1280, 500])
def test_layout_in_a_browser(written: tuple[str, dict[str, Any]], tmp_path: Path, width: int) -> None:
    text, result = written
    copy = tmp_path / "probed.html"
    copy.write_text(re.sub("<meta http-equiv.*>", "", text).replace("</body>", PROBE), encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen = re.search(r'<pre id="probe">(.+?)</pre>', done.stdout)
    assert seen, done.stderr[-1000:]
    probe = json.loads(html.unescape(seen[1]))
    assert probe["page"] <= probe["width"] == width
    assert probe["loaded"] == 0
    assert probe["trouble"] == []
    for bars, rows in zip(probe["charts"], problems(result["rows"]).values(), strict=True):
        rates = [1 / row["median_s"] for row in rows]
        scale = max(bars) / max(rates)
        assert bars == pytest.approx([scale * rate for rate in rates], abs=2e-4)
        assert 0 < max(bars) <= 1
