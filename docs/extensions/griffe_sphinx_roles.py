"""Lets the API pages show docstrings with reStructuredText roles, ``::`` before indented blocks, and ``Example:``."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(?P<short>~?\.?)(?P<target>[\w.]+)`")


def to_markdown(text: str) -> str:
    """The docstring in Markdown, with the names of sections that griffe knows.

    A role becomes a link, which is plain text where the manual has no such name.
    """

    def link(match: re.Match[str]) -> str:
        target = match["target"]
        shown = target.rsplit(".", 1)[-1] if "~" in match["short"] else target
        return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'

    text = re.sub(r"^Example:$", "Examples:", ROLE.sub(link, text), flags=re.MULTILINE)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


class SphinxRoles(griffe.Extension):
    """Translates every docstring after its object was loaded."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Translate the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
