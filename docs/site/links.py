"""Copies source files that the documents link to onto the site, and points the links there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).resolve().parents[2]
_OUTSIDE = re.compile(r"(?<=\]\()\.\./(?=([^)#]+))")


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside `docs/` that the documents link to."""
    for page in files.documentation_pages():
        for target in _OUTSIDE.findall(page.content_string):
            if files.get_file_from_path(target) is None and (_ROOT / target).is_file():
                files.append(File.generated(config, target, abs_src_path=str(_ROOT / target)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point the links to the copies."""
    return _OUTSIDE.sub("", markdown)
