"""Every Python block of the documentation's pages runs, in order, each page in a namespace of its own."""

import re
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

PAGES = sorted(Path(__file__).parent.parent.joinpath("docs").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]


@pytest.mark.cpu_only("the pages' tensors are on the CPU")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = page.read_text()
    if "from transformers import" in text:
        pytest.importorskip("transformers")
    module = types.ModuleType("page")  # a real one: torch.compile looks names up there
    monkeypatch.setitem(sys.modules, "page", module)
    with warnings.catch_warnings():  # torch's own, about flex_attention that isn't compiled
        warnings.simplefilter("ignore")
        for block in BLOCK.finditer(text):
            line = text[: block.start(1)].count("\n")  # so that a traceback names the page's own line
            exec(compile("\n" * line + block.group(1), str(page), "exec"), vars(module))


def test_there_is_code_to_run():
    assert "swap-in.md" in {page.name for page in WITH_CODE}
