"""The pages of the manual, and the code blocks, commands and links in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

NOT_RUN = "# not run here: "
"""How a Python block begins that a plain process cannot run; the reason follows."""

_FENCE = re.compile(
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PLACEHOLDER = re.compile(r"…|\b(VERB|MODULE)\b")
_INLINE_COMMAND = re.compile(r"(python|torchrun|sfw-dist|make|pip|sbatch|slurm/local_cluster/\w+)\s+[-\w./]")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Of the first line below the fence, from 1."""
    language: str
    title: str | None
    """The file that the block is the content of."""
    text: str


def page_id(page: Path) -> str:
    """The page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        yield Block(page, line, match["language"], match["title"], match["text"])


def block_commands(page: Path) -> list[list[str]]:
    """The commands in a page's ``sh`` blocks, as words; without comments."""
    shell = (block.text.replace("\\\n", " ") for block in blocks(page) if block.language == "sh")
    lines = (shlex.split(line, comments=True) for text in shell for line in text.splitlines())
    return [words for words in lines if words]


def inline_commands(page: Path) -> list[list[str]]:
    """The commands in the running text of a page, as words; without those that have placeholders."""
    prose = _FENCE.sub("", page.read_text())
    spans = (match[1] for match in _INLINE.finditer(prose))
    return [shlex.split(span) for span in spans if _INLINE_COMMAND.match(span) and not _PLACEHOLDER.search(span)]


def links(page: Path) -> list[str]:
    """The links of a page to files of the repository, without anchors."""
    prose = _FENCE.sub("", page.read_text())
    targets = (match[1].partition("#")[0] for match in _LINK.finditer(prose))
    return [target for target in targets if target and "://" not in target]


def code_spans(page: Path) -> list[str]:
    """What stands between backticks in the running text of a page."""
    return [match[1] for match in _INLINE.finditer(_FENCE.sub("", page.read_text()))]
