"""The data sets known by name."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import NoReturn

import pytest

from sfw_dist.data.datasets.registry import DATASETS
from sfw_dist.data.options import Options
from sfw_dist.data.prepare import prepare
from sfw_dist.errors import UserError
from tests.support.downloads import error_of, one_line


def test_unknown_data_set_lists_the_known_ones(tmp_path: Path) -> None:
    """A typo ends in a KeyError, or without a word on what there is."""
    with pytest.raises(UserError, match=r"'digit'.*digits, fashion_mnist") as error:
        prepare("digit", tmp_path)
    one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_registry_entries_are_consistent() -> None:
    """An entry is filed under another name, or misses what the manifest needs."""
    for name, dataset in DATASETS.items():
        assert dataset.name == name
        assert dataset.source
        assert dataset.classes is None or len(set(dataset.classes)) == len(dataset.classes) > 1


@pytest.mark.parametrize("name", ["tiny_imagenet", "cifar10", "cifar100", "svhn", "mnist"])
def test_without_network_the_error_tells_what_is_wanted_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On a cluster node without a network the user learns only 'Name or service not known'."""

    def no_network(*args: object, **kwargs: object) -> NoReturn:
        raise OSError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    message = error_of(lambda: prepare(name, tmp_path))
    assert "http" in message and "md5:" in message and f"into {tmp_path / 'raw' / name}" in message


def test_size_is_refused_where_images_have_their_own(tmp_path: Path) -> None:
    """--size is ignored silently."""
    assert "8×8" in error_of(lambda: prepare("digits", tmp_path, options=Options(size=(16, 16))))
    assert "at least 1" in error_of(lambda: prepare("imagefolder", tmp_path, options=Options(size=(0, 1))))
