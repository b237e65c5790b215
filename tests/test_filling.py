"""The table of how splits fill a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from perceiver_kernels import _library

if _library.cuda_missing is not None:
    pytest.skip(str(_library.cuda_missing), allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import filling


def test_the_last_wave_is_full_or_there_is_a_reason(tmp_path: Path) -> None:
    rows = list(filling.rows())
    assert len(rows) == 2 * 27
    for row in rows:
        for direction in ("forward", "backward"):
            plan = row[direction]
            assert plan["all"] >= 0.88 or filling.reason(row, direction), row
            assert (plan["last"] >= filling.ENOUGH) == (filling.reason(row, direction) == "")
            assert plan["all"] > 0.57 or plan["steps"] == 1
        if row["keys"] > 8192:
            assert row["forward"]["all"] >= 0.94, row
    assert filling.main(["--json", str(tmp_path / "f.json"), "--markdown", str(tmp_path / "f.md")]) == 0
    assert (tmp_path / "f.md").read_text().count("\n| A100 |") == 27


def test_flash_attention_s_own_rules() -> None:
    """Figures that follow from the rules by hand."""
    assert filling.flash_attention_2(1024, 8, 16384, 108)["splits"] == 3  # 128 blocks in 216 places
    assert filling.flash_attention_2(1024, 16, 16384, 108)["splits"] == 1  # 256: no split from 173 on
    assert filling.flash_attention_2(1, 8, 131072, 132)["splits"] > 20
    assert filling.flash_attention_3(1024, 8, 512, 132)["splits"] == 1  # four blocks of keys
    assert filling.flash_attention_3(4096, 8, 8192, 132)["splits"] == 1
