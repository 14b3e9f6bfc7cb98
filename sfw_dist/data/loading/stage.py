"""Staging: a copy of a data set's files on a disk of this node."""

from __future__ import annotations

import shutil
from pathlib import Path

from sfw_dist.data.manifest import MANIFEST, FileRecord, Manifest, file_record, prepare_again
from sfw_dist.errors import UserError
from sfw_dist.files import file_lock, make_folder, remedy_of, replacing


def staged(folder: Path, manifest: Manifest, stage_dir: Path, files: list[str]) -> Path:
    """Copy files of a prepared data set to another disk, unless they are already there.

    One process copies while the others of the node wait. The copy's name holds the manifest's hash, so a data set that
    was prepared again is staged again.

    Args:
        folder: the prepared data set.
        manifest: what ``folder`` holds.
        stage_dir: where the copy's folder is made.
        files: names of the files to copy; the manifest is copied too.

    Returns:
        The folder that holds the copies.

    Raises:
        UserError: the files cannot be written, or the original is damaged.
    """
    target = stage_dir / f"{folder.name}-{file_record(folder / MANIFEST).sha256[:12]}"
    try:
        make_folder(target)
        with file_lock(target / ".lock"):
            for name in (*files, MANIFEST):
                if not _is_staged(target / name, manifest.files.get(name)):
                    with (folder / name).open("rb") as original, replacing(target / name) as copy:
                        shutil.copyfileobj(original, copy, 1 << 22)
                    _check(target / name, manifest.files.get(name), folder)
    except OSError as error:
        raise UserError(
            f"data.stage_dir {stage_dir}: cannot copy {folder} there ({error}): "
            f"{remedy_of(error, 'choose another folder, or leave it out')}"
        ) from error
    return target


def _is_staged(path: Path, record: FileRecord | None) -> bool:
    return path.is_file() and (record is None or path.stat().st_size == record.bytes)


def _check(path: Path, record: FileRecord | None, folder: Path) -> None:
    """Hash a new copy, which is still in memory, so that a damaged original is found."""
    if record is not None and file_record(path) != record:
        path.unlink()
        raise UserError(f"{folder / path.name} is damaged (its sha256 is not the manifest's): {prepare_again(folder)}")
