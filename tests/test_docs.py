"""The documentation's code works: Python blocks run, page by page, and commands are ones that exist."""

import re
import shlex
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from perceiver_kernels.cli import parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text() for page in PAGES}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_CODE = [name for name, text in TEXTS.items() if BLOCK.search(text)]
# On a line of its own or in backquotes.
COMMAND = re.compile(r"(?:^    |`)(perceiver-kernels|make)( [a-z][^`#|\n]*)(?=`|#|\n)", re.MULTILINE)
COMMANDS = sorted(
    {("".join(found.groups())).strip() for text in TEXTS.values() for found in COMMAND.finditer(text)}
)


def save_small_model(path: Path) -> None:
    """What a page means by a model's path."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).save_pretrained(path)


@pytest.mark.cpu_only("the pages' tensors are on the CPU")
@pytest.mark.parametrize("name", WITH_CODE)
def test_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = TEXTS[name]
    for optional in ("transformers", "perceiver_ar_pytorch"):
        if f"from {optional} import" in text:
            pytest.importorskip(optional)
    module = types.ModuleType("page")  # a real one: torch.compile looks names up there
    monkeypatch.setitem(sys.modules, "page", module)
    with warnings.catch_warnings():  # torch's own, about flex_attention that isn't compiled
        warnings.simplefilter("ignore")
        if '"path/to/model"' in text:
            save_small_model(tmp_path / "path" / "to" / "model")
        for block in BLOCK.finditer(text):
            line = text[: block.start(1)].count("\n")  # so that a traceback names the page's own line
            exec(compile("\n" * line + block.group(1), name, "exec"), vars(module))


def test_there_is_code_to_run():
    assert {"README.md", "quickstart.md", "swap-in.md"} <= set(WITH_CODE)
    assert not re.search(r"^```(?!python$|$)", "".join(TEXTS.values()), re.MULTILINE)
    assert not re.search(r"^    >>> ", "".join(TEXTS.values()), re.MULTILINE)  # it would not be run


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    program, *arguments = shlex.split(command)
    if program == "perceiver-kernels":
        parser().parse_args(arguments)
        return
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in arguments if "=" not in word} <= set(targets)
