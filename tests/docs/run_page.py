"""Run the Python blocks of one page in order, in one namespace: ``python -m tests.docs.run_page PAGE``.

A block with a title is the content of a file, which is written into the current folder instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.docs.pages import NOT_RUN, Block, blocks


def write_files(page: Path) -> None:
    """Write the blocks of ``page`` that have a title."""
    for block in blocks(page):
        if block.title is not None:
            Path(block.title).write_text(block.text)


def run_blocks(page: Path) -> None:
    """Run the other Python blocks of ``page``; a traceback shows the lines of the page."""
    namespace = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python" and block.title is None and not block.text.startswith(NOT_RUN):
            exec(compiled(block), namespace)


def compiled(block: Block) -> object:
    """The block's code, with the lines of the page."""
    return compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    page = Path(sys.argv[1]).resolve()
    write_files(page)
    run_blocks(page)
