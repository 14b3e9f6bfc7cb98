"""Archives: malicious, interrupted and truncated ones."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import sfw_dist.data.prepare as preparing
from sfw_dist.data.datasets.unpack import unpack
from tests.support.downloads import error_of


def zip_with(path: Path, name: str, mode: int = stat.S_IFREG | 0o644) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("top/good.txt", "good")
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, "/etc/passwd")
    return path


def tar_with(path: Path, name: str, kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member, member_kind in (("top/good.txt", tarfile.REGTYPE), (name, kind)):
            info = tarfile.TarInfo(member)
            info.type, info.linkname = member_kind, "/etc/passwd"
            info.size = 4 if member_kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"good"))
    return path


BAD_NAMES = ["../evil.txt", "top/../../evil.txt", "/tmp/evil.txt", "other/evil.txt", "top"]


@pytest.mark.parametrize(
    "make",
    [
        *(lambda folder, name=name: zip_with(folder / "a.zip", name) for name in BAD_NAMES),
        *(lambda folder, name=name: tar_with(folder / "a.tar.gz", name) for name in BAD_NAMES),
        lambda folder: zip_with(folder / "a.zip", "top/link", stat.S_IFLNK | 0o777),
        lambda folder: tar_with(folder / "a.tar.gz", "top/link", tarfile.SYMTYPE),
        lambda folder: tar_with(folder / "a.tar.gz", "top/hard", tarfile.LNKTYPE),
        lambda folder: tar_with(folder / "a.tar.gz", "top/pipe", tarfile.FIFOTYPE),
    ],
)
def test_a_malicious_archive_writes_nothing(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """A member leaves the folder, or a link leads out of it."""
    folder = tmp_path / "inner" / "raw"
    folder.mkdir(parents=True)
    archive = make(folder)
    assert f"cannot unpack {archive}" in error_of(lambda: unpack(archive, folder / "top"))
    assert sorted(tmp_path.rglob("*")) == sorted([folder.parent, folder, archive])


@pytest.mark.parametrize("make", [zip_with, tar_with])
def test_unpacking_is_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path, str], Path]
) -> None:
    """After an interruption the folder lacks files and is taken for whole, or unpacking starts from zero."""
    archive = make(tmp_path / ("a.zip" if make is zip_with else "a.tar.gz"), "top/deep/er.txt")
    copy, copied = preparing.shutil.copyfileobj, []

    def copy_one(source: io.BytesIO, file: io.BytesIO) -> None:
        if len(copied) == 1:
            copied.append("interrupted")
            raise KeyboardInterrupt
        copied.append("copied")
        copy(source, file)

    monkeypatch.setattr(preparing.shutil, "copyfileobj", copy_one)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, tmp_path / "top")
    assert not (tmp_path / "top").exists()
    unpack(archive, tmp_path / "top")
    assert copied == ["copied", "interrupted", "copied"]
    assert (tmp_path / "top" / "good.txt").read_text() == "good"
    assert sorted(path.name for path in (tmp_path / "top").rglob("*")) == ["deep", "er.txt", "good.txt"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_a_truncated_archive_is_named(tmp_path: Path, name: str) -> None:
    """A traceback from zipfile, tarfile or zlib."""
    archive = tmp_path / name
    (zip_with if name.endswith("zip") else tar_with)(archive, "top/other.txt")
    archive.write_bytes(archive.read_bytes()[:-40])
    assert f"cannot unpack {archive}" in error_of(lambda: unpack(archive, tmp_path / "top"))
    assert not (tmp_path / "top").exists()
