"""Downloads published files: resumes after interruptions, and keeps only a file with the published checksum."""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.request
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from sfw_dist.data.datasets.progress_bar import progress_bar
from sfw_dist.errors import UserError
from sfw_dist.files import make_folder

BLOCK = 1 << 20
RANGE_NOT_SATISFIABLE, PARTIAL_CONTENT = 416, 206


@dataclass(frozen=True)
class Remote:
    """A file that can be downloaded."""

    url: str
    checksum: str
    """``md5:…`` or ``sha256:…`` of the file, or ``content-md5:…`` … of its content once unzipped; in hexadecimal."""
    alternative: str = ""
    """Another way to get it, for the error message."""

    @property
    def name(self) -> str:
        """The file's name: the last part of the address."""
        return self.url.rpartition("/")[2]


def fetch(remote: Remote, folder: Path) -> Path:
    """Download a file unless it exists.

    An interrupted download is kept (``.part``), and the next call continues it.

    Args:
        remote: the file.
        folder: where it is looked for and downloaded to; made if it is missing.

    Returns:
        ``folder/remote.name``.

    Raises:
        UserError: the file cannot be downloaded, or the existing one has another checksum. The message names address,
            checksum and folder.
    """
    target = folder / remote.name
    part = target.with_name(f"{target.name}.part")
    if target.exists():
        if not matches(target, remote.checksum):
            raise UserError(f"{target} is damaged (wanted {remote.checksum}): delete it to fetch {remote.url} again")
        return target
    try:
        make_folder(folder)
        _download(remote.url, part)
        if not matches(part, remote.checksum):
            part.unlink()
            raise ValueError("what arrived has another checksum")
    except (OSError, ValueError, HTTPException) as error:
        remedy = f"{remote.alternative}, or " if remote.alternative else ""
        raise UserError(
            f"cannot download {remote.url} ({error}; wanted {remote.checksum}): {remedy}put {remote.name} into {folder}"
        ) from None
    os.replace(part, target)
    return target


def _download(url: str, part: Path) -> None:
    """Download what ``part`` lacks, or everything when the server does not serve ranges."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except HTTPError as error:
        if done and error.code == RANGE_NOT_SATISFIABLE:
            return  # the part is complete; its checksum is checked by the caller
        raise
    with response:
        if response.status != PARTIAL_CONTENT:
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        with part.open("ab" if done else "wb") as file, progress_bar(part.stem, total, done) as advance:
            while block := response.read(BLOCK):
                file.write(block)
                done += len(block)
                advance(len(block))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done < total:
        raise ConnectionError(f"the connection ended after {done:,} of {total:,} bytes, try again to continue there")


def matches(path: Path, checksum: str) -> bool:
    """Whether a file is the one that was published.

    Args:
        path: of the file. Of a ``content-`` checksum it may be the packed or the plain one.
        checksum: as in :class:`Remote`.
    """
    kind, _, wanted = checksum.rpartition(":")
    try:
        with gzip.open(path) if kind.startswith("content-") and _is_gzip(path) else path.open("rb") as file:
            return hashlib.file_digest(file, kind.removeprefix("content-")).hexdigest() == wanted
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return False


def _is_gzip(path: Path) -> bool:
    return path.name.removesuffix(".part").endswith(".gz")
