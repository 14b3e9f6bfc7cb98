"""Writing files that are never half there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, writable by the owner alone whatever the umask."""
    for folder in (*reversed(path.parents), path):
        folder.mkdir(mode=0o755, exist_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes ``path``'s place, complete, when the block ends; or not at all."""
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
    """Write a whole file or nothing."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file or nothing; a number that is not finite is an error, for JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
