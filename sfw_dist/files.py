"""Writing files so that a reader finds the whole file or none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, writable by the owner alone whatever the umask.

    Args:
        path: the folder; nothing happens when it exists.
    """
    for folder in (*reversed(path.parents), path):
        folder.mkdir(mode=0o755, exist_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file that replaces ``path`` when the block ends; if the block raises, ``path`` is left as it was.

    Args:
        path: the file to make or replace. Its folder must exist.

    Yields:
        A temporary file in the same folder, open for writing bytes. It is synchronised to disk before it is renamed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by a UTF-8 file with this text, completely or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as JSON, completely or not at all.

    Args:
        path: the file to make or replace.
        value: what :mod:`json` can write.

    Raises:
        ValueError: ``value`` holds a number that is not finite, which JSON cannot express.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
