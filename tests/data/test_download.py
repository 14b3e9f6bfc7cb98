"""Downloads: resumed, and kept only with the published checksum."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

from sfw_dist.data.datasets.download import fetch
from tests.support.downloads import Server, error_of, forbidden, remote_of


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool) -> None:
    """250 MB start from zero at every lost connection, or the whole file is appended to its first part."""
    content = bytes(range(256)) * 8
    remote = remote_of(content)
    server = Server(content, most=1000, ranges=ranges)
    monkeypatch.setattr(urllib.request, "urlopen", server)
    message = error_of(lambda: fetch(remote, tmp_path / "raw"))
    assert remote.url in message and remote.checksum in message and str(tmp_path / "raw") in message
    server.most = 1 << 30
    assert fetch(remote, tmp_path / "raw").read_bytes() == content
    assert server.asked == [None, "bytes=1000-"]
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["file.bin"]
    monkeypatch.setattr(urllib.request, "urlopen", forbidden)
    fetch(remote, tmp_path / "raw")


def test_a_complete_part_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the last byte and the rename, the download fails for ever with status 416."""
    (tmp_path / "file.bin.part").write_bytes(b"content")
    monkeypatch.setattr(urllib.request, "urlopen", Server(b"content"))
    assert fetch(remote_of(b"content"), tmp_path).read_bytes() == b"content"


def test_a_wrong_download_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error page is taken for the data, or stays as the part that every later try continues."""
    monkeypatch.setattr(urllib.request, "urlopen", Server(b"<html>sorry</html>"))
    assert "another checksum" in error_of(lambda: fetch(remote_of(b"content"), tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_on_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive that a user copied there, truncated, is unpacked."""
    (tmp_path / "file.bin").write_bytes(b"cont")
    monkeypatch.setattr(urllib.request, "urlopen", forbidden)
    assert "file.bin is damaged" in error_of(lambda: fetch(remote_of(b"content"), tmp_path))
