"""Unpacks archives that may be malicious: plain files below one expected folder, and nothing else."""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from sfw_dist.data.datasets.progress_bar import progress_bar
from sfw_dist.errors import UserError
from sfw_dist.files import make_folder


class _Member(NamedTuple):
    name: str
    is_file: bool
    is_folder: bool
    """A member that is neither is a link or a device."""
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or gzipped tar file.

    The folder appears complete or not at all; the next call continues an interrupted one.

    Args:
        archive: all of its members must be below one folder, ``folder.name``.
        folder: to make.

    Raises:
        UserError: the archive is damaged, or has a member with an absolute path, with ``..`` or in another top folder,
            a link or a device. Nothing is written then.
    """
    unfinished = folder.with_name(f".{folder.name}.unpacking")
    try:
        with _open_archive(archive) as members:
            for member in members:
                _check(member, folder.name)
            files = [member for member in members if member.is_file]
            with progress_bar(f"unpacking {archive.name}", len(files)) as advance:
                for member in files:
                    _extract(member, unfinished.joinpath(*PurePosixPath(member.name).parts[1:]))
                    advance(1)
    # zipfile raises RuntimeError for an encrypted member. BadGzipFile is an OSError; other OSErrors come from the disk.
    except (
        zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, RuntimeError
    ) as error:  # fmt: skip
        raise UserError(f"cannot unpack {archive} ({error}): delete it to fetch it again") from None
    os.replace(unfinished, folder)


@contextmanager
def _open_archive(archive: Path) -> Iterator[list[_Member]]:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            yield [_zip_member(zipped, info) for info in zipped.infolist()]
    else:
        with tarfile.open(archive, "r:gz") as tarred:
            yield [_tar_member(tarred, info) for info in tarred]


def _zip_member(zipped: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 in archives that were not made on Unix
    is_file = not info.is_dir() and kind in (0, stat.S_IFREG)
    return _Member(info.filename, is_file, info.is_dir() and kind in (0, stat.S_IFDIR), lambda: zipped.open(info))


def _tar_member(tarred: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    def open_member() -> IO[bytes]:
        content = tarred.extractfile(info)
        assert content is not None  # tarfile returns None only for links and devices
        return content

    return _Member(info.name, info.isreg(), info.isdir(), open_member)


def _check(member: _Member, top: str) -> None:
    """Raises ``ValueError`` for a member that would not be a file or folder below ``top``."""
    parts = PurePosixPath(member.name).parts
    inside = parts[:1] == (top,) and ".." not in parts and not {"\\", "\0"} & set(member.name)
    if not inside or (member.is_file and len(parts) == 1):
        raise ValueError(f"member {member.name!r} is not within {top}/")
    if not (member.is_file or member.is_folder):
        raise ValueError(f"member {member.name!r} is a link or a device")


def _extract(member: _Member, target: Path) -> None:
    if target.exists():  # an earlier, interrupted call has made it
        return
    make_folder(target.parent)
    partial = target.with_name(f".{target.name}.partial")
    with member.open() as source, partial.open("wb") as file:
        shutil.copyfileobj(source, file)
    os.replace(partial, target)
