"""What the site needs beside docs/: files that pages link to, and the README's measurements."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)\)")  # a link out of docs/, as it reads on a code host


def on_files(files: Files, config: Any) -> Files:
    """Add measured.md and a copy of every file outside docs/ that a page links to."""
    pages = [Path(file.abs_src_path).read_text(encoding="utf-8") for file in files.documentation_pages()]
    pages.append(measured())
    files.append(File.generated(config, "measured.md", content=pages[-1]))
    for path in sorted({path for page in pages for path in OUTSIDE.findall(page)}):
        files.append(File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path)))
    return files


def measured() -> str:
    """The README's sections of measurements as a page of docs/."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = readme.index("## Measured\n"), readme.index("## More\n")
    text = re.sub(r"\]\((?!docs/|https?:)", "](../", readme[begin:end])
    return text.replace("](docs/", "](").replace("## ", "# ", 1)


def on_page_content(html: str, **_: Any) -> str:
    """Drop what docstrings say to Sphinx alone."""
    return re.sub(r":(?:func|class|meth|mod):(?=<code>)", "", html)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links out of docs/ at the copies."""
    return OUTSIDE.sub(r"](repository/\1)", markdown)
