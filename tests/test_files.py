"""Locks on files, errors of the operating system, and paths as people write them."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

import sfw_dist.files as files
from sfw_dist.errors import UserError
from sfw_dist.files import LockedError, file_lock, remedy_of, user_path


def test_a_lock_keeps_others_out_until_it_ends(tmp_path: Path) -> None:
    """Fails when two processes write one folder, or a lock outlives its block, or an error in it."""
    path, order = tmp_path / "lock", []

    def second() -> None:
        with file_lock(path):
            order.append("second")

    thread = threading.Thread(target=second)
    with pytest.raises(KeyError), file_lock(path):
        with pytest.raises(LockedError), file_lock(path, wait=False):
            pass
        thread.start()
        order.append("first")
        raise KeyError
    thread.join()
    assert order == ["first", "second"]
    with file_lock(path, wait=False):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("wait", [True, False])
def test_without_locks_it_warns_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, wait: bool
) -> None:
    """Fails when a file system without locks hangs, or is said to hold another process."""

    def without(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", without)
    done = False
    with file_lock(tmp_path / "lock", wait=wait):
        done = True
    error = capsys.readouterr().err
    assert done and error.count("\n") == 1 and f"{tmp_path} is on a file system without locks" in error


def test_other_errors_of_a_lock_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a broken disk counts as one without locks."""

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output"), file_lock(tmp_path / "lock", wait=False):
        pass


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space, or X"),
        (errno.EDQUOT, "free some space, or X"),
        (errno.EACCES, "give yourself the right to it, or X"),
        (errno.EROFS, "give yourself the right to it, or X"),
        (errno.ENOTDIR, "X"),
        (errno.EIO, "X"),
    ],
)
def test_the_remedy_fits_the_error(number: int, remedy: str) -> None:
    """Fails when somebody without the right to a folder is told to free some space."""
    assert remedy_of(OSError(number, os.strerror(number)), "X") == remedy


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a folder named ~ is made, or a name with ~ inside is changed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/data") == tmp_path / "data" and user_path("a/~/b") == Path("a/~/b")
    with pytest.raises(UserError, match=r"~nobody-here/x: there is no such home folder"):
        user_path("~nobody-here/x")
