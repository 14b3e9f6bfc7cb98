"""Hooks of ``mkdocs build``: pages of results, and the help texts of the commands.

- Every ``results/*/README.md`` with its figures and data becomes a part of the site. In the repository a page of
  ``docs/`` links to ``../results/...``; on the site, which has no folder ``docs``, that is one folder less.
- ``<!-- help: MODULE -->`` in a page is replaced by what ``python -m MODULE --help`` prints.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()((?:\.\./)+[^)#\s]*)")
HELP = re.compile(r"<!-- help: (?P<module>[\w.]+) -->")
HELP_COLUMNS = "100"


def on_files(files: Any, *, config: Any) -> Any:
    """Add the results to the site's files."""
    from mkdocs.structure.files import File, InclusionLevel

    for path in sorted((ROOT / "results").rglob("*")):
        if path.is_file():
            uri = path.relative_to(ROOT).as_posix()
            file = File.generated(config, uri, abs_src_path=str(path))
            file.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(file)
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Translate links between the repository's folders, and insert help texts."""
    source = page.file.src_uri
    in_repository = source if source.startswith("results/") else f"docs/{source}"

    def on_site(match: re.Match[str]) -> str:
        link: str = match[1]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), link))
        uri = target.removeprefix("docs/")
        if target == uri and not uri.startswith("results/"):
            return link
        return posixpath.relpath(uri, posixpath.dirname(source))

    return HELP.sub(lambda match: f"```text\n{help_text(match['module'])}```", LINK.sub(on_site, markdown))


def help_text(module: str) -> str:
    """What ``python -m MODULE --help`` prints."""
    package = importlib.import_module(module)
    command = importlib.import_module(f"{module}.__main__") if hasattr(package, "__path__") else package
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [module, "--help"]),
        mock.patch.dict(os.environ, {"COLUMNS": HELP_COLUMNS}),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        command.main()
    return printed.getvalue()
