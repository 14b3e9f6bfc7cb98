"""Files: written so that a reader finds the whole or none, locked between processes, and named by people."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from sfw_dist.errors import UserError

NO_LOCKS = frozenset((errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS))
"""What ``flock`` answers on file systems without locks."""
REFUSED = frozenset((errno.EACCES, errno.EPERM, errno.EROFS))
"""What the operating system answers where a user may not write."""


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


class LockedError(Exception):
    """Another process holds a lock."""


@contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Keep other processes, and threads, out of the block. The lock ends with its process, however that ends.

    A file system without locks keeps nobody out: the block runs after a warning on stderr.

    Args:
        path: the lock's file; made if it is missing, and left there.
        wait: for another process that holds the lock.

    Raises:
        LockedError: another process holds the lock, without ``wait``.
        OSError: the file cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES) and not wait:
                raise LockedError(str(path)) from None
            raise
        print(
            f"warning: {path.parent} is on a file system without locks ({error.strerror}), so no second process is "
            "kept out: start one at a time",
            file=sys.stderr,
        )
    try:
        yield
    finally:
        with suppress(OSError):  # explicitly: a forked process may hold a copy of the descriptor
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def remedy_of(error: OSError, otherwise: str) -> str:
    """What a user can do about an error of the operating system.

    Args:
        error: that a file could not be read or written.
        otherwise: what helps against any error: another place to write to.

    Example:
        >>> remedy_of(OSError(28, "No space left on device"), "choose another root")
        'free some space, or choose another root'
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"free some space, or {otherwise}"
    if error.errno in REFUSED:
        return f"give yourself the right to it, or {otherwise}"
    return otherwise


def user_path(text: str | Path) -> Path:
    """A path as a person writes it: ``~`` is the home folder, also where no shell replaces it.

    Raises:
        UserError: there is no such home.

    Example:
        >>> user_path("data/~x")
        PosixPath('data/~x')
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no such home folder: write the whole path, or ./{text}") from None
