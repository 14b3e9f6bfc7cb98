"""The raw files that a data set was prepared from, and whether they have changed since."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from sfw_dist.data.datasets.image_sets import image_files
from sfw_dist.data.datasets.raw import RawData
from sfw_dist.data.datasets.registry import Dataset
from sfw_dist.data.manifest import FileRecord, file_record, prepare_again
from sfw_dist.errors import UserError
from sfw_dist.files import write_json

SOURCE = "source_files.json"
"""Maps each raw file, as a path from the data root, to length, time in ns and CRC-32; to ``null`` if it was missing."""
_State = list[int] | None


def write_source(folder: Path, raw: RawData) -> dict[str, FileRecord]:
    """Record the raw files of a data set that is being prepared.

    Args:
        folder: to write :data:`SOURCE` to.
        raw: what the reader returned.

    Returns:
        The record of the file by its name; nothing where no raw files are.
    """
    paths = [*raw.files, *image_files(raw)]
    if not paths:
        return {}
    write_json(folder / SOURCE, {_key(path, folder.parent): _state(path) for path in paths})
    return {SOURCE: file_record(folder / SOURCE)}


def source_changes(folder: Path, dataset: Dataset) -> list[str]:
    """Compare the raw files with those that a folder was prepared from.

    A copy with other times is no change. Nothing is known of folders that earlier versions prepared, and nothing is
    wrong where the raw files were all removed.

    Args:
        folder: of the prepared data set.
        dataset: which one it is.

    Returns:
        ``path (new)``, ``path (gone)`` or ``path (changed)`` for each file that differs.

    Raises:
        UserError: the record is damaged; or the raw folder cannot be listed.
    """
    try:
        before: dict[str, _State] = json.loads((folder / SOURCE).read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / SOURCE} is damaged ({error}): {prepare_again(folder)}") from None
    root = folder.parent
    if not any((root / name).exists() for name in before):
        return []
    changes = [f"{root / name} ({how})" for name, state in before.items() if (how := _difference(root / name, state))]
    if dataset.list_files is not None:
        changes += [f"{path} (new)" for path in dataset.list_files(root) if _key(path, root) not in before]
    return changes


def _difference(path: Path, before: _State) -> str:
    """How a file differs from its recorded state; empty if it does not."""
    try:
        status = path.stat()
    except OSError:
        return "" if before is None else "gone"
    if before is None:
        return "new"
    length, time, _ = before
    same = status.st_size == length and (status.st_mtime_ns == time or _state(path, time) == before)
    return "" if same else "changed"


def _state(path: Path, time: int | None = None) -> _State:
    """Length, time (``time`` if given) and CRC-32 of a file; ``None`` if it cannot be read."""
    checksum = 0
    try:
        status = path.stat()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                checksum = zlib.crc32(block, checksum)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns if time is None else time, checksum]


def _key(path: Path, root: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path.absolute())
