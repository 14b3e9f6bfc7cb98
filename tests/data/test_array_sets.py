"""Readers of the data sets that are a few binary files, in the layout of the real ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from sfw_dist.data.datasets import registry
from sfw_dist.data.datasets.array_sets import cifar_reader, mnist_reader, read_digits, svhn_reader
from sfw_dist.data.datasets.registry import DATASETS
from sfw_dist.data.manifest import read_manifest
from sfw_dist.data.prepare import prepare
from sfw_dist.errors import UserError
from tests.support.downloads import Response, Server, error_of, one_line, remote_of


def test_digits_split_never_changes(tmp_path: Path) -> None:
    """Another split (a new scikit-learn, another hash) makes accuracies of two runs incomparable, silently."""
    raw = read_digits(tmp_path)
    assert raw.train.images.shape == (1346, 8, 8, 1) and raw.test.images.shape == (451, 8, 8, 1)
    assert raw.train.images.max() == 240 and raw.train.images.dtype == np.uint8
    digest = hashlib.sha256(raw.test.images.tobytes() + raw.test.labels.tobytes()).hexdigest()
    assert digest == "efb597ff4e14aeb45c4188d4d381fe369d67d27c4450e8ef240dd9d77e16646f"


def test_digits_split_is_stratified_and_complete(tmp_path: Path) -> None:
    """A class is missing from the test set, or samples are lost or in both parts."""
    from sklearn.datasets import load_digits

    raw = read_digits(tmp_path)
    share = np.bincount(raw.test.labels) / np.bincount(np.concatenate([raw.train.labels, raw.test.labels]))
    np.testing.assert_allclose(share, 0.25, atol=0.01)
    everything = np.concatenate([raw.train.images, raw.test.images])[..., 0]
    rows = np.unique(load_digits().images.reshape(-1, 64), axis=0)
    np.testing.assert_array_equal(np.unique(everything.reshape(-1, 64) // 15, axis=0), rows)


def test_fashion_mnist_is_read_from_idx_files(fashion_root: Path) -> None:
    """Pixels are permuted, labels lost, or only one of gzip and plain is read."""
    raw = DATASETS["fashion_mnist"].read(fashion_root)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 28, 28))
    np.testing.assert_array_equal(raw.train.images[..., 0], pixels)
    np.testing.assert_array_equal(raw.test.labels, np.arange(10))
    assert raw.train.labels.dtype == np.int64


def test_without_network_the_error_tells_address_checksum_and_package(
    fashion_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster node without a network the user learns only 'Name or service not known'."""

    def no_network(*args: object, **kwargs: object) -> NoReturn:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    name = "train-labels-idx1-ubyte"
    (fashion_root / "raw" / "fashion_mnist" / f"{name}.gz").unlink()
    with pytest.raises(UserError) as error:
        DATASETS["fashion_mnist"].read(fashion_root)
    message = one_line(error)
    assert f"{registry.FASHION_MNIST_URL}{name}.gz" in message
    assert registry.FASHION_MNIST_CHECKSUMS[name] in message
    assert "apt-get install x, or put" in message


def test_a_download_is_kept_only_with_the_right_checksum(fashion_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy's error page or a tampered file is taken for the data set, now and in every later run."""
    name = "train-labels-idx1-ubyte"
    path = fashion_root / "raw" / "fashion_mnist" / f"{name}.gz"
    content = path.read_bytes()
    path.unlink()
    before = sorted(path.parent.iterdir())

    for wrong in (b"<html>log in first</html>", gzip.compress(gzip.decompress(content) + b"more")):
        monkeypatch.setattr(urllib.request, "urlopen", Server(wrong))
        with pytest.raises(UserError, match="cannot download"):
            DATASETS["fashion_mnist"].read(fashion_root)
        assert sorted(path.parent.iterdir()) == before

    monkeypatch.setattr(urllib.request, "urlopen", Server(content))
    DATASETS["fashion_mnist"].read(fashion_root)
    assert path.read_bytes() == content


@pytest.mark.parametrize("file", ["train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte"])
def test_a_local_file_is_the_published_one_packed_or_plain(fashion_root: Path, file: str) -> None:
    """Fails when a file is trained on that is whole but of another data set, or one that was packed anew is refused."""
    path = fashion_root / "raw" / "fashion_mnist" / file
    packed = file.endswith(".gz")
    content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    if packed:
        path.write_bytes(gzip.compress(content, 1, mtime=9))
        DATASETS["fashion_mnist"].read(fashion_root)
    other = content[:-1] + bytes([(content[-1] + 1) % 10])
    path.write_bytes(gzip.compress(other) if packed else other)
    message = error_of(lambda: DATASETS["fashion_mnist"].read(fashion_root))
    wanted = registry.FASHION_MNIST_CHECKSUMS[file.removesuffix(".gz")]
    assert f"{path} is damaged or not of fashion_mnist (wanted {wanted})" in message


@pytest.mark.skipif(not registry.FASHION_MNIST_DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_debian_package_is_the_published_data(tmp_path: Path) -> None:
    """The recorded checksums are of something else, so that every download would be refused."""
    for stem, checksum in registry.FASHION_MNIST_CHECKSUMS.items():
        archive = registry.FASHION_MNIST_DEBIAN / f"{stem}.gz"
        assert f"content-sha256:{hashlib.sha256(gzip.decompress(archive.read_bytes())).hexdigest()}" == checksum
    raw = DATASETS["fashion_mnist"].read(tmp_path)
    assert raw.train.images.shape == (60_000, 28, 28, 1) and raw.test.images.shape == (10_000, 28, 28, 1)


def test_mnist_is_downloaded_and_its_counts_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MNIST misses the code of its twin, or a data set with samples missing is trained on."""
    files = {}
    for split in ("train", "t10k"):
        for kind, shape in (("images-idx3", (5, 28, 28)), ("labels-idx1", (5,))):
            header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
            files[f"{split}-{kind}-ubyte"] = gzip.compress(header + bytes(int(np.prod(shape))))

    def serve(request: urllib.request.Request, timeout: float) -> Response:
        return Server(files[request.full_url.rpartition("/")[2].removesuffix(".gz")])(request, timeout)

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    checksums = {stem: f"md5:{hashlib.md5(content).hexdigest()}" for stem, content in files.items()}
    dataset = replace(DATASETS["mnist"], read=mnist_reader("mnist", "http://example.org/", checksums))
    monkeypatch.setitem(DATASETS, "mnist", dataset)
    assert "train: 5, wanted 60,000" in error_of(lambda: prepare("mnist", tmp_path))
    monkeypatch.setitem(DATASETS, "mnist", replace(dataset, counts={"train": 5, "test": 5}))
    assert read_manifest(prepare("mnist", tmp_path)).counts == {"train": 5, "test": 5}


@pytest.mark.parametrize(("name", "label_bytes"), [("cifar10", 1), ("cifar100", 2)])
def test_cifar_is_read_from_its_archive(tmp_path: Path, name: str, label_bytes: int) -> None:
    """Channels and rows are mixed up, or CIFAR-100's coarse labels are taken."""
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (8, label_bytes + 3072), dtype=np.uint8)
    records[:, label_bytes - 1] = np.arange(8) % 3
    contents = {
        "a.bin": records[:4].tobytes(),
        "b.bin": records[4:6].tobytes(),
        "test.bin": records[6:].tobytes(),
        "names.txt": b"cat\ndog\nfrog\n\n",
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for file, content in contents.items():
            info = tarfile.TarInfo(f"top/{file}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    folder = tmp_path / "raw" / name
    folder.mkdir(parents=True)
    (folder / "c.tar.gz").write_bytes(packed.getvalue())
    read = cifar_reader(
        name, remote_of(packed.getvalue(), "c.tar.gz"), "top", ["a.bin", "b.bin"], "test.bin", "names.txt", label_bytes
    )
    raw = read(tmp_path)
    assert raw.classes == ("cat", "dog", "frog")
    assert raw.train.images.shape == (6, 32, 32, 3) and raw.test.images.shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(raw.train.labels, np.arange(6) % 3)
    assert raw.train.images[5, 3, 7, 2] == records[5, label_bytes + 2 * 1024 + 3 * 32 + 7]

    (folder / "top" / "b.bin").write_bytes(contents["b.bin"][:-1])
    assert "b.bin" in error_of(lambda: read(tmp_path))
    (folder / "top" / "b.bin").unlink()
    assert "b.bin" in error_of(lambda: read(tmp_path))


def test_svhn_is_read_from_matlab_files(tmp_path: Path) -> None:
    """Axes are mixed up, or the label 10, which means zero, is out of range."""
    from scipy.io import savemat

    folder = tmp_path / "raw" / "svhn"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 10), dtype=np.uint8)
    savemat(folder / "m.mat", {"X": images, "y": np.arange(1, 11, dtype=np.uint8)[:, np.newaxis]})
    content = (folder / "m.mat").read_bytes()
    read = svhn_reader("svhn", remote_of(content, "m.mat"), remote_of(content, "m.mat"))
    raw = read(tmp_path)
    np.testing.assert_array_equal(raw.test.labels, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    np.testing.assert_array_equal(raw.train.images[4], images[..., 4])

    savemat(folder / "m.mat", {"X": images, "y": np.arange(10, dtype=np.uint8)[:, np.newaxis]})
    content = (folder / "m.mat").read_bytes()
    read = svhn_reader("svhn", remote_of(content, "m.mat"), remote_of(content, "m.mat"))
    assert "m.mat is damaged (labels" in error_of(lambda: read(tmp_path))
