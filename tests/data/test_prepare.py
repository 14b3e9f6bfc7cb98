"""Preparing data sets: raw sources, the prepared folder, its verification and the command."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from email.message import Message
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

import sfw_dist.data.prepare as preparing
from sfw_dist.data.__main__ import main
from sfw_dist.data.datasets import registry
from sfw_dist.data.datasets.array_sets import mnist_reader, read_digits
from sfw_dist.data.datasets.raw import RawArrays
from sfw_dist.data.datasets.registry import DATASETS, Dataset, find_dataset
from sfw_dist.data.manifest import read_manifest
from sfw_dist.data.prepare import channel_statistics, prepare, verify
from sfw_dist.errors import UserError


def tiny_arrays(root: Path) -> RawArrays:
    """Colour images, not square, so that a swapped axis or channel shows."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 4, 5, 3), dtype=np.uint8)
    labels = np.arange(20) % 2
    return RawArrays(images[:14], labels[:14], images[14:], labels[14:])


def register(monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], RawArrays] = tiny_arrays) -> None:
    monkeypatch.setitem(DATASETS, "tiny", Dataset("tiny", ("even", "odd"), (3, 4, 5), "made up", read))


class Response(io.BytesIO):
    """What ``urlopen`` returns."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.status, self.headers = 200, Message()


def forbidden(*args: object) -> NoReturn:
    raise AssertionError("must not be called")


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- sources ----------------------------------------------------------------------------------------------------------


def test_unknown_data_set_lists_the_known_ones(tmp_path: Path) -> None:
    """A typo ends in a KeyError, or without a word on what there is."""
    with pytest.raises(UserError, match=r"'digit'.*digits, fashion_mnist") as error:
        prepare("digit", tmp_path)
    one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_digits_split_never_changes(tmp_path: Path) -> None:
    """Another split (a new scikit-learn, another hash) makes accuracies of two runs incomparable, silently."""
    raw = read_digits(tmp_path)
    assert raw.train_images.shape == (1346, 8, 8, 1) and raw.test_images.shape == (451, 8, 8, 1)
    assert raw.train_images.max() == 240 and raw.train_images.dtype == np.uint8
    digest = hashlib.sha256(raw.test_images.tobytes() + raw.test_labels.tobytes()).hexdigest()
    assert digest == "efb597ff4e14aeb45c4188d4d381fe369d67d27c4450e8ef240dd9d77e16646f"


def test_digits_split_is_stratified_and_complete(tmp_path: Path) -> None:
    """A class is missing from the test set, or samples are lost or in both parts."""
    from sklearn.datasets import load_digits

    raw = read_digits(tmp_path)
    share = np.bincount(raw.test_labels) / np.bincount(np.concatenate([raw.train_labels, raw.test_labels]))
    np.testing.assert_allclose(share, 0.25, atol=0.01)
    everything = np.concatenate([raw.train_images, raw.test_images])[..., 0]
    rows = np.unique(load_digits().images.reshape(-1, 64), axis=0)
    np.testing.assert_array_equal(np.unique(everything.reshape(-1, 64) // 15, axis=0), rows)


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Fashion-MNIST in the layout of the real one, training files gzipped, test files plain."""
    read = mnist_reader(
        "fashion_mnist", registry.FASHION_MNIST_URL, registry.FASHION_MNIST_CHECKSUMS, alternative="apt-get install x"
    )
    counts = {"train": 30, "test": 10}
    monkeypatch.setitem(DATASETS, "fashion_mnist", replace(DATASETS["fashion_mnist"], read=read, counts=counts))
    monkeypatch.setattr(urllib.request, "urlopen", forbidden)
    folder = tmp_path / "raw" / "fashion_mnist"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, n in (("train", 30), ("t10k", 10)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (n, 28, 28))),
            ("labels-idx1", np.arange(n) % 10),
        ):
            content, path = idx_bytes(array), folder / f"{split}-{kind}-ubyte"
            if split == "train":
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)
    return tmp_path


def test_fashion_mnist_is_read_from_idx_files(fashion_root: Path) -> None:
    """Pixels are permuted, labels lost, or only one of gzip and plain is read."""
    raw = DATASETS["fashion_mnist"].read(fashion_root)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 28, 28))
    np.testing.assert_array_equal(raw.train_images[..., 0], pixels)
    np.testing.assert_array_equal(raw.test_labels, np.arange(10))
    assert raw.train_labels.dtype == np.int64


def _truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train-images-idx3-ubyte.gz", _truncate),
        ("train-images-idx3-ubyte.gz", lambda content: b"<html>not found</html>"),
        ("train-labels-idx1-ubyte.gz", lambda content: content[:30] + b"\xff\xff" + content[32:]),
        ("t10k-images-idx3-ubyte", _truncate),
        ("t10k-images-idx3-ubyte", lambda content: content[:6]),
        ("t10k-images-idx3-ubyte", lambda content: b""),
        ("t10k-images-idx3-ubyte", lambda content: content + b"\0"),
        ("t10k-images-idx3-ubyte", lambda content: b"\0\0\x0d\x03" + content[4:]),
        ("t10k-labels-idx1-ubyte", lambda content: idx_bytes(np.arange(9))),
        ("t10k-labels-idx1-ubyte", lambda content: idx_bytes(np.arange(10) + 1)),
        ("t10k-images-idx3-ubyte", lambda content: idx_bytes(np.zeros((10, 8, 8)))),
    ],
)
def test_a_damaged_raw_file_is_named(fashion_root: Path, file: str, damage: Callable[[bytes], bytes]) -> None:
    """A truncated download ends in a traceback from zlib or numpy, or trains on garbage."""
    path = fashion_root / "raw" / "fashion_mnist" / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as error:
        prepare("fashion_mnist", fashion_root)
    assert file in one_line(error)
    assert not (fashion_root / "fashion_mnist").exists()


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

    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: Response(content))
    with pytest.raises(UserError, match="cannot download"):
        DATASETS["fashion_mnist"].read(fashion_root)
    assert sorted(path.parent.iterdir()) == before

    sha256 = hashlib.sha256(gzip.decompress(content)).hexdigest()
    monkeypatch.setitem(registry.FASHION_MNIST_CHECKSUMS, name, f"content-sha256:{sha256}")
    DATASETS["fashion_mnist"].read(fashion_root)
    assert path.read_bytes() == content


@pytest.mark.skipif(not registry.FASHION_MNIST_DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_debian_package_is_the_published_data(tmp_path: Path) -> None:
    """The recorded checksums are of something else, so that every download would be refused."""
    for stem, checksum in registry.FASHION_MNIST_CHECKSUMS.items():
        archive = registry.FASHION_MNIST_DEBIAN / f"{stem}.gz"
        assert f"content-sha256:{hashlib.sha256(gzip.decompress(archive.read_bytes())).hexdigest()}" == checksum
    raw = DATASETS["fashion_mnist"].read(tmp_path)
    assert raw.train_images.shape == (60_000, 28, 28, 1) and raw.test_images.shape == (10_000, 28, 28, 1)


# --- the prepared folder ----------------------------------------------------------------------------------------------


def test_prepared_folder_holds_the_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays differ from the source, cannot be memory-mapped, or the manifest misstates them."""
    register(monkeypatch)
    folder = prepare("tiny", tmp_path)
    raw, manifest = tiny_arrays(tmp_path), read_manifest(folder)
    assert folder == tmp_path / "tiny"
    for part, images, labels in (
        ("train", raw.train_images, raw.train_labels),
        ("test", raw.test_images, raw.test_labels),
    ):
        np.testing.assert_array_equal(np.load(folder / f"{part}_images.npy", mmap_mode="r"), images)
        np.testing.assert_array_equal(np.load(folder / f"{part}_labels.npy", mmap_mode="r"), labels)
        assert manifest.counts[part] == len(labels)
    assert manifest.classes == ("even", "odd") and manifest.image_shape == (3, 4, 5)
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {"manifest.json"}


def test_channel_statistics_are_per_channel_in_unit_range() -> None:
    """Statistics over all channels, in 0..255, or of the last chunk only: the network sees shifted inputs."""
    images = np.random.default_rng(0).integers(0, 256, (5000, 2, 3, 3), dtype=np.uint8)
    images[..., 1] //= 4
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=1e-12)


def test_a_prepared_data_set_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank of every run converts the data set anew."""
    register(monkeypatch)
    prepare("tiny", tmp_path)
    register(monkeypatch, read=forbidden)
    prepare("tiny", tmp_path)


def test_processes_at_once_prepare_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that start together write into each other's files."""
    reads, start = [], threading.Barrier(4)

    def slow_read(root: Path) -> RawArrays:
        reads.append(root)
        time.sleep(0.2)  # room for the others to barge in, were there no lock
        return tiny_arrays(root)

    def rank() -> None:
        start.wait()
        prepare("tiny", tmp_path)

    register(monkeypatch, slow_read)
    threads = [threading.Thread(target=rank) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1 and verify("tiny", tmp_path) == []


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), RuntimeError("crash")])
def test_interrupted_prepare_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException
) -> None:
    """Ctrl-C in the middle leaves a folder that later runs take for complete."""

    def interrupt(*args: object) -> NoReturn:
        raise interruption

    register(monkeypatch)
    monkeypatch.setattr(preparing, "channel_statistics", interrupt)  # after the arrays have been written
    with pytest.raises(type(interruption)):
        prepare("tiny", tmp_path)
    assert visible(tmp_path) == []


def test_a_full_disk_is_a_user_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV's own writer waits for ever when its worker cannot write."""

    def full(*args: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    register(monkeypatch)
    monkeypatch.setattr(preparing, "_beton_writer", lambda: full)
    with pytest.raises(UserError, match="No space left") as error:
        prepare("tiny", tmp_path)
    one_line(error)
    assert visible(tmp_path) == []


def test_leftovers_of_a_killed_process_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a SIGKILL in the middle no later prepare succeeds, or it keeps half-written files."""
    register(monkeypatch)
    unfinished = tmp_path / ".tiny.unfinished"
    unfinished.mkdir()
    (unfinished / "stray.npy").write_bytes(b"half")
    prepare("tiny", tmp_path)
    assert visible(tmp_path) == ["tiny"] and not (tmp_path / "tiny" / "stray.npy").exists()


@pytest.mark.parametrize("file", ["train_images.npy", "test_labels.npy", "manifest.json"])
def test_a_truncated_file_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """The remedy that the errors give, to prepare again, does nothing."""
    register(monkeypatch)
    path = prepare("tiny", tmp_path) / file
    path.write_bytes(path.read_bytes()[:-9])
    prepare("tiny", tmp_path)
    assert verify("tiny", tmp_path) == [] and visible(tmp_path) == ["tiny"]


def test_a_folder_of_the_user_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's own data/tiny is deleted."""
    register(monkeypatch)
    own = tmp_path / "tiny" / "thesis.txt"
    own.parent.mkdir()
    own.write_text("years of work")
    with pytest.raises(UserError, match="move it away"):
        prepare("tiny", tmp_path)
    assert own.read_text() == "years of work"


def test_betons_are_added_once_ffcv_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV is installed later, and training keeps the slow backend, or the data set is read again."""
    pytest.importorskip("ffcv")
    register(monkeypatch)
    with monkeypatch.context() as without_ffcv:
        without_ffcv.setattr(preparing, "_beton_writer", lambda: None)
        folder = prepare("tiny", tmp_path)
        assert not read_manifest(folder).has_betons and visible(folder) == sorted(
            ["manifest.json", *read_manifest(folder).files]
        )
    register(monkeypatch, read=forbidden)
    prepare("tiny", tmp_path)
    assert read_manifest(folder).has_betons and verify("tiny", tmp_path) == []


@pytest.mark.parametrize(("n", "side"), [(7, 5), (400, 64)])
def test_beton_is_what_ffcv_writes(tmp_path: Path, n: int, side: int) -> None:
    """Our writer strays from FFCV's format: (400, 64) fills several pages."""
    pytest.importorskip("ffcv")
    from ffcv.fields import IntField, NDArrayField
    from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter

    from sfw_dist.data.loading.ffcv import write_beton

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, side, side + 1, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, n)
    fields = {"image": NDArrayField(np.dtype("uint8"), images.shape[1:]), "label": IntField()}
    writer = DatasetWriter(str(tmp_path / "theirs"), fields, page_size=MIN_PAGE_SIZE, num_workers=1)
    writer.from_indexed_dataset(list(zip(images, labels, strict=True)))
    with (tmp_path / "ours").open("wb") as file:
        write_beton(file, images, labels)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


# --- verify and the command -------------------------------------------------------------------------------------------


def flip_middle_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_middle_byte, Path.unlink, lambda path: path.write_bytes(b"short")])
def test_verify_names_the_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    """One flipped bit on the disk goes unnoticed, or the wrong file is blamed."""
    register(monkeypatch)
    folder = prepare("tiny", tmp_path)
    assert verify("tiny", tmp_path) == []
    damage(folder / "test_images.npy")
    (problem,) = verify("tiny", tmp_path)
    assert "test_images.npy" in problem and f"delete the folder {folder}" in problem and "\n" not in problem


def test_verify_reports_every_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first of several problems is told."""
    register(monkeypatch)
    folder = prepare("tiny", tmp_path)
    files = list(read_manifest(folder).files)
    for file in files:
        flip_middle_byte(folder / file)
    assert len(verify("tiny", tmp_path)) == len(files)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "files": {"a": 3}}'])
def test_a_damaged_manifest_is_one_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: str) -> None:
    """A KeyError from within, instead of the file's name and the remedy."""
    register(monkeypatch)
    path = prepare("tiny", tmp_path) / "manifest.json"
    path.write_text(manifest)
    (problem,) = verify("tiny", tmp_path)
    assert "manifest.json is damaged" in problem and "\n" not in problem


def test_command_prepares_and_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts cannot tell success from damage: exit statuses 0, 1, 2 or the JSON are wrong."""
    register(monkeypatch)
    arguments = ["tiny", "--root", str(tmp_path)]
    assert main(["prepare", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"train": 14, "test": 6}
    assert main(["prepare", *arguments]) == 0
    assert "14 train, 6 test" in capsys.readouterr().out
    assert main(["verify", *arguments]) == 0
    capsys.readouterr()

    flip_middle_byte(tmp_path / "tiny" / "train_images.npy")
    flip_middle_byte(tmp_path / "tiny" / "test_labels.npy")
    assert main(["verify", *arguments]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["verify", *arguments, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2


def test_command_reports_user_errors_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback, or exit status 1, which means that verify found damage."""
    for command in ("prepare", "verify"):
        assert main([command, "nonesuch", "--root", str(tmp_path)]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1 and "nonesuch" in output.err


@pytest.mark.parametrize("command", [[], ["prepare"], ["verify"]])
def test_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The help of a subcommand is bare."""
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    assert "python -m sfw_dist.data prepare digits --root data" in capsys.readouterr().out


def test_registry_entries_are_consistent() -> None:
    """An entry is filed under another name, or misses what the manifest needs."""
    for name, dataset in DATASETS.items():
        assert find_dataset(name) is dataset and dataset.name == name
        assert dataset.source
        assert dataset.classes is None or len(set(dataset.classes)) == len(dataset.classes) > 1
