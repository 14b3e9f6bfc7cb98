"""Run the Python blocks of one page in order, in one namespace: ``python -m tests.docs.run_page PAGE``.

A block with a title is the content of a file, which is written into the present folder instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.docs.pages import NOT_RUN, Block, blocks


def run_page(page: Path) -> None:
    """Run, or write, every Python block of ``page``; a traceback then shows the lines of the page."""
    namespace = {"__name__": "page"}
    for block in blocks(page):
        if block.language != "python":
            continue
        if block.title is not None:
            Path(block.title).write_text(block.text)
        elif not block.text.startswith(NOT_RUN):
            exec(compiled(block), namespace)


def compiled(block: Block) -> object:
    """The block's code, with the lines of the page."""
    return compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run_page(Path(sys.argv[1]).resolve())
