"""Raw data sets in the layout of the real ones: downloads, archives, readers and image files."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import stat
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import replace
from email.message import Message
from pathlib import Path
from typing import NoReturn
from urllib.error import HTTPError

import numpy as np
import pytest
from PIL import Image

import sfw_dist.data.decode as decoding
import sfw_dist.data.prepare as preparing
from sfw_dist.config import DataConfig, load_config
from sfw_dist.data.__main__ import main
from sfw_dist.data.datasets.array_sets import cifar_reader, mnist_reader, svhn_reader
from sfw_dist.data.datasets.download import Remote, fetch
from sfw_dist.data.datasets.registry import DATASETS, TINY_IMAGENET
from sfw_dist.data.datasets.unpack import unpack
from sfw_dist.data.loading import open_loader
from sfw_dist.data.manifest import read_manifest
from sfw_dist.data.prepare import prepare, verify
from sfw_dist.errors import RankError, UserError
from sfw_dist.evaluate.sweep import evaluate
from sfw_dist.train.run_folder import RunFolder
from sfw_dist.train.trainer import train
from tests.support.training import ONE_PROCESS


def error_of(call: Callable[[], object]) -> str:
    """The message of the UserError; it must be one line."""
    with pytest.raises(UserError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    return message


def forbidden(*args: object, **kwargs: object) -> NoReturn:
    raise AssertionError("must not be called")


def remote_of(content: bytes, name: str = "file.bin") -> Remote:
    return Remote(f"http://example.org/{name}", f"md5:{hashlib.md5(content).hexdigest()}")


# --- download ---------------------------------------------------------------------------------------------------------


class Response(io.BytesIO):
    """What ``urlopen`` returns; ``length`` is the announced one."""

    def __init__(self, content: bytes, status: int, length: int) -> None:
        super().__init__(content)
        self.status, self.headers = status, Message()
        self.headers["Content-Length"] = str(length)


class Server:
    """Serves ``content``, of which at most ``most`` bytes arrive before the connection ends."""

    def __init__(self, content: bytes, most: int = 1 << 30, ranges: bool = True) -> None:
        self.content, self.most, self.ranges = content, most, ranges
        self.asked: list[str | None] = []

    def __call__(self, request: urllib.request.Request, timeout: float) -> Response:
        asked = request.get_header("Range")
        self.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        if start and start >= len(self.content):
            raise HTTPError(request.full_url, 416, "Range Not Satisfiable", Message(), None)
        rest = self.content[start:]
        return Response(rest[: self.most], 206 if start else 200, len(rest))


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


# --- archives ---------------------------------------------------------------------------------------------------------


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


# --- binary files -----------------------------------------------------------------------------------------------------


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
    assert raw.train_images.shape == (6, 32, 32, 3) and raw.test_images.shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(raw.train_labels, np.arange(6) % 3)
    assert raw.train_images[5, 3, 7, 2] == records[5, label_bytes + 2 * 1024 + 3 * 32 + 7]

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
    np.testing.assert_array_equal(raw.test_labels, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    np.testing.assert_array_equal(raw.train_images[4], images[..., 4])

    savemat(folder / "m.mat", {"X": images, "y": np.arange(10, dtype=np.uint8)[:, np.newaxis]})
    content = (folder / "m.mat").read_bytes()
    read = svhn_reader("svhn", remote_of(content, "m.mat"), remote_of(content, "m.mat"))
    assert "m.mat is damaged (labels" in error_of(lambda: read(tmp_path))


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


# --- Tiny-ImageNet ----------------------------------------------------------------------------------------------------

WNIDS = ("n03", "n01", "n02")  # wnids.txt is not sorted


def save_image(path: Path, value: int, mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> None:
    """Nearly one colour, with noise so that half the file lacks half of the image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 9, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise + np.uint8(value)).convert(mode).save(path, quality=95)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny-ImageNet's layout with 3 classes of 4 training and 2 validation images, some of them grayscale."""
    monkeypatch.setattr(urllib.request, "urlopen", forbidden)
    monkeypatch.setattr(decoding, "CHUNK", 5)
    counts = {"train": 12, "test": 6, "classes": 3}
    monkeypatch.setitem(DATASETS, "tiny_imagenet", replace(DATASETS["tiny_imagenet"], counts=counts))
    folder = tmp_path / "raw" / "tiny_imagenet" / "tiny-imagenet-200"
    annotations = []
    for i, wnid in enumerate(sorted(WNIDS)):
        names = [f"{wnid}_{j}.JPEG" for j in range(4)]
        for j, name in enumerate(names):
            save_image(folder / "train" / wnid / "images" / name, 60 * i + 10 * j, "L" if j == 3 else "RGB")
        boxes = "".join(f"{name}\t0\t0\t63\t63\n" for name in names)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
        for j in range(2):
            save_image(folder / "val" / "images" / f"val_{2 * i + j}.JPEG", 200 + 10 * i + j, "L" if j else "RGB")
            annotations.append(f"val_{2 * i + j}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(reversed(annotations)))
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    return tmp_path


def images_of(root: Path) -> Path:
    return root / "raw" / "tiny_imagenet" / "tiny-imagenet-200" / "train" / "n02" / "images"


def damage(root: Path) -> tuple[str, ...]:
    """Make three training files of n02 useless, and a validation file; their names."""
    folder = images_of(root)
    (folder / "n02_0.JPEG").write_bytes(b"no image at all")
    content = (folder / "n02_1.JPEG").read_bytes()
    (folder / "n02_1.JPEG").write_bytes(content[: len(content) // 2])
    (folder / "n02_2.JPEG").unlink()
    save_image(folder.parents[2] / "val" / "images" / "val_0.JPEG", 1, size=(65, 64))
    return "n02_0.JPEG", "n02_1.JPEG", "n02_2.JPEG", "val_0.JPEG"


def test_tiny_imagenet_is_prepared(tiny: Path) -> None:
    """Classes follow wnids.txt unsorted, annotations are ignored, or a grayscale image is refused."""
    folder = prepare("tiny_imagenet", tiny)
    manifest = read_manifest(folder)
    assert manifest.classes == ("n01", "n02", "n03") and manifest.image_shape == (3, 64, 64)
    assert manifest.counts == {"train": 12, "test": 6} and manifest.skipped == ()
    images, labels = np.load(folder / "train_images.npy"), np.load(folder / "train_labels.npy")
    np.testing.assert_array_equal(labels, np.repeat([0, 1, 2], 4))
    level = images.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(level, [60 * i + 10 * j + 4 for i in range(3) for j in range(4)], atol=1)
    assert (images[3] == images[3, :, :, :1]).all()
    np.testing.assert_array_equal(np.load(folder / "test_labels.npy"), [2, 2, 1, 1, 0, 0])
    test_level = np.load(folder / "test_images.npy").mean(axis=(1, 2, 3))
    np.testing.assert_allclose(test_level, [225, 224, 215, 214, 205, 204], atol=1)
    assert verify("tiny_imagenet", tiny) == []
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    listed = json.loads((folder / "test_files.json").read_text())
    assert listed[0] == "raw/tiny_imagenet/tiny-imagenet-200/val/images/val_5.JPEG" and len(listed) == 6


def test_tiny_imagenet_goes_from_its_folder_to_a_pruned_network(tiny: Path) -> None:
    """A part of the way from image files to a pruning curve does not fit the next."""
    damage(tiny)
    prepare("tiny_imagenet", tiny, skip_bad=True)
    base = load_config(Path(__file__).parents[2] / "configs" / "tiny_imagenet_resnet18.yaml")
    config = replace(
        base,
        runs_dir=str(tiny / "runs"),
        data=replace(base.data, root=str(tiny), batch_size=4, eval_batch_size=2, validation_fraction=0.0),
        model=replace(base.model, width=0.0625),
        train=replace(base.train, epochs=1),
    )
    runs = {}
    for backend in ("ram", "folder"):
        of_backend = replace(config, name=backend, data=replace(config.data, backend=backend))
        runs[backend] = RunFolder(of_backend.run_dir)
        assert train(of_backend, ONE_PROCESS) == 0
        results = evaluate(runs[backend], ONE_PROCESS, sparsities=[0.0, 0.9])
        assert [result["samples"] for result in results] == [5, 5]
    assert runs["ram"].weights.read_bytes() == runs["folder"].weights.read_bytes()


def test_an_image_that_went_bad_later_is_named_while_training(tiny: Path) -> None:
    """A run over image files ends with PIL's traceback, and nobody knows which of 100,000 it was."""
    prepare("tiny_imagenet", tiny)
    config = DataConfig("tiny_imagenet", str(tiny), "folder", batch_size=4, validation_fraction=0.0)
    loader = open_loader(config, "train", seed=0)
    (images_of(tiny) / "n02_1.JPEG").write_bytes(b"gone bad")
    with pytest.raises(RankError, match=r"tiny_imagenet train sample 5 \(.*n02_1.JPEG\) cannot be loaded"):
        list(loader)
    loader.close()


def test_every_bad_file_is_named(tiny: Path) -> None:
    """Only the first of several bad files is named, or a truncated JPEG is trained on half grey."""
    names = damage(tiny)
    message = error_of(lambda: prepare("tiny_imagenet", tiny))
    assert message.startswith("4 image file(s)") and all(name in message for name in names)
    for reason in ("not an image", "truncated", "missing", "65×64 pixels"):
        assert reason in message
    assert not (tiny / "tiny_imagenet").exists()


def test_many_bad_files_are_ten_and_a_count(tiny: Path) -> None:
    """A wrong mount fills the terminal with 100,000 names."""
    for path in images_of(tiny).parents[1].rglob("*.JPEG"):
        path.write_bytes(b"")
    message = error_of(lambda: prepare("tiny_imagenet", tiny))
    assert message.count(".JPEG") == 10 and "and 2 more" in message


def test_skip_bad_goes_on_and_lists_them(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels shift against the images behind a skipped file, or nobody learns what was left out."""
    names = damage(tiny)
    assert main(["prepare", "tiny_imagenet", "--root", str(tiny), "--skip-bad"]) == 0
    assert "9 train, 5 test samples, 4 skipped" in capsys.readouterr().out
    folder = tiny / "tiny_imagenet"
    manifest = read_manifest(folder)
    assert all(name in line for name, line in zip(names, manifest.skipped, strict=True))
    level = np.load(folder / "train_images.npy").mean(axis=(1, 2, 3))
    np.testing.assert_array_equal(np.load(folder / "train_labels.npy"), (level / 60).astype(int))
    assert verify("tiny_imagenet", tiny) == []


def test_interrupted_twice_it_finishes_what_is_left(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each interruption costs everything done so far, or half-done work ends up in the data set."""
    decode_image, decoded = decoding.decode_image, []

    def interrupted_after(limit: int) -> Callable[..., np.ndarray]:
        def decode(path: Path, side: int, fit: bool) -> np.ndarray:
            if len(decoded) >= limit:
                raise RuntimeError("killed")
            decoded.append(path.name)
            return decode_image(path, side, fit)

        return decode

    for limit in (7, 14):
        monkeypatch.setattr(decoding, "decode_image", interrupted_after(limit))
        with pytest.raises(RuntimeError, match="killed"):
            prepare("tiny_imagenet", tiny)
        assert not (tiny / "tiny_imagenet").exists()
        (tiny / ".tiny_imagenet.unfinished" / "train_images.npy").write_bytes(b"of a killed process")
    first = tiny / ".tiny_imagenet.unfinished" / "chunks" / "train" / "0000000.npz"
    first.write_bytes(first.read_bytes()[:-100])
    monkeypatch.setattr(decoding, "decode_image", interrupted_after(1000))
    folder = prepare("tiny_imagenet", tiny)

    assert decoded.count("n01_1.JPEG") == 2, "a damaged chunk is done again"
    assert decoded.count("n02_2.JPEG") <= 2 and decoded.count("val_5.JPEG") == 1
    assert len(decoded) < 2 * 18
    level = np.load(folder / "train_images.npy").mean(axis=(1, 2, 3))
    np.testing.assert_allclose(level, [60 * i + 10 * j + 4 for i in range(3) for j in range(4)], atol=1)
    assert sorted(path.name for path in tiny.iterdir() if not path.name.endswith(".lock")) == ["raw", "tiny_imagenet"]
    assert verify("tiny_imagenet", tiny) == []


def test_a_repaired_file_is_decoded_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user replaces the bad files and still reads of them; or the good chunks are decoded twice."""
    names = damage(tiny)
    error_of(lambda: prepare("tiny_imagenet", tiny))
    for name in names[:3]:
        save_image(images_of(tiny) / name, 99)
    save_image(images_of(tiny).parents[2] / "val" / "images" / "val_0.JPEG", 98)
    decode_image, decoded = decoding.decode_image, []

    def counted(path: Path, side: int, fit: bool) -> np.ndarray:
        decoded.append(path.name)
        return decode_image(path, side, fit)

    monkeypatch.setattr(decoding, "decode_image", counted)
    assert read_manifest(prepare("tiny_imagenet", tiny)).counts == {"train": 12, "test": 6}
    assert set(names) <= set(decoded) and "n03_3.JPEG" not in decoded


def test_tiny_imagenet_comes_out_of_its_archive(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive that a user put there is not taken; without it, the error does not tell what is wanted where."""
    raw = tiny / "raw" / "tiny_imagenet"
    tree = raw / "tiny-imagenet-200"
    with zipfile.ZipFile(raw / "tiny-imagenet-200.zip", "w") as archive:
        for path in sorted(tree.rglob("*")):
            archive.write(path, path.relative_to(raw))
    preparing.shutil.rmtree(tree)
    message = error_of(lambda: prepare("tiny_imagenet", tiny))
    assert "tiny-imagenet-200.zip is damaged" in message and TINY_IMAGENET.checksum in message

    checksum = f"md5:{hashlib.md5((raw / 'tiny-imagenet-200.zip').read_bytes()).hexdigest()}"
    with monkeypatch.context() as known:
        known.setattr(
            "sfw_dist.data.datasets.image_sets.unpacked",
            lambda remote, parent, top: _unpacked(remote, parent, checksum),
        )
        assert read_manifest(prepare("tiny_imagenet", tiny)).counts == {"train": 12, "test": 6}


def _unpacked(remote: Remote, parent: Path, checksum: str) -> Path:
    from sfw_dist.data.datasets.array_sets import unpacked

    return unpacked(replace(remote, checksum=checksum), parent, "tiny-imagenet-200")


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


@pytest.mark.parametrize("file", ["wnids.txt", "val/val_annotations.txt", "train/n02/n02_boxes.txt"])
def test_a_list_that_is_missing_or_strange_is_named(tiny: Path, file: str) -> None:
    """A KeyError or FileNotFoundError from within; or a class without images."""
    path = tiny / "raw" / "tiny_imagenet" / "tiny-imagenet-200" / file
    path.write_text("strange\n")
    error_of(lambda: prepare("tiny_imagenet", tiny))
    path.unlink()
    assert f"{path} cannot be read (missing)" in error_of(lambda: prepare("tiny_imagenet", tiny))


# --- folders of images ------------------------------------------------------------------------------------------------


def test_imagefolder_is_scaled_and_cropped(tmp_path: Path) -> None:
    """The image is squeezed, or cropped at a corner, or the size is not what the manifest tells."""
    folder = tmp_path / "raw" / "imagefolder"
    save_image(folder / "train" / "b" / "deep" / "x.png", 50, size=(40, 20))
    save_image(folder / "train" / "a" / "y.jpg", 100)
    save_image(folder / "val" / "b" / "z.png", 7, size=(16, 16))
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 200  # what the centre crop keeps
    Image.fromarray(wide).save(folder / "train" / "b" / "w.png")
    prepared = prepare("imagefolder", tmp_path, size=16)
    manifest = read_manifest(prepared)
    assert manifest.image_shape == (3, 16, 16) and manifest.classes == ("a", "b")
    np.testing.assert_array_equal(np.load(prepared / "train_labels.npy"), [0, 1, 1])
    images = np.load(prepared / "train_images.npy")
    assert images.shape == (3, 16, 16, 3) and images[2, :, 2:-2].min() == 200
    np.testing.assert_array_equal(
        np.load(prepared / "test_images.npy")[0], np.asarray(Image.open(folder / "val/b/z.png"))
    )
    assert "choose another root" in error_of(lambda: prepare("imagefolder", tmp_path, size=32))
    prepare("imagefolder", tmp_path)


def test_imagefolder_mistakes_are_told(tmp_path: Path) -> None:
    """An empty class or a class of the test part alone is trained on."""
    folder = tmp_path / "raw" / "imagefolder"
    assert "train" in error_of(lambda: prepare("imagefolder", tmp_path))
    save_image(folder / "train" / "a" / "x.png", 1)
    assert "val" in error_of(lambda: prepare("imagefolder", tmp_path))
    save_image(folder / "val" / "b" / "x.png", 1)
    assert "'b'" in error_of(lambda: prepare("imagefolder", tmp_path))
    (folder / "train" / "b").mkdir()
    assert "holds no images" in error_of(lambda: prepare("imagefolder", tmp_path))


def test_size_is_refused_where_images_have_their_own(tmp_path: Path) -> None:
    """--size is ignored silently."""
    assert "8×8" in error_of(lambda: prepare("digits", tmp_path, size=16))
    assert "at least 1" in error_of(lambda: prepare("imagefolder", tmp_path, size=0))
