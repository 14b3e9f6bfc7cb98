"""Data sets of one's own: functions, values of Python, folders; written once, then known by name."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfw_dist.config import DataConfig
from sfw_dist.data import Options, write
from sfw_dist.data.__main__ import main
from sfw_dist.data.datasets.own_sets import read_values
from sfw_dist.data.loading import dataset_info, open_loader, rank_sampler
from sfw_dist.data.manifest import read_manifest
from sfw_dist.data.prepare import prepare, verify
from sfw_dist.data.writing import image_writer
from sfw_dist.errors import UserError
from tests.support.downloads import error_of
from tests.support.raw_data import save_image

MODULE = """
import numpy as np

def images(n, first=0):
    return (np.arange(n * 4 * 6 * 5).reshape(n, 4, 6, 5) + first).astype(np.uint8)

def flowers():
    return {"train": (images(20), [i % 2 for i in range(20)]), "test": (images(6, 7), [0, 1] * 3)}

def no_test():
    return {"train": (images(20), [i % 2 for i in range(20)])}

def needs(size):
    return {}

def nothing():
    return [1, 2]
"""


class Squares:
    """A Dataset of 4×6 images; the n-th is n everywhere."""

    def __init__(self, n: int, make: Callable[[int], Any] | None = None) -> None:
        self._n, self._make = n, make or (lambda i: (np.full((4, 6), i, np.uint8), i % 2))

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Any:
        return self._make(index)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's own, by name."""
    (tmp_path / "own_flowers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_flowers"
    sys.modules.pop("own_flowers", None)


def images_of(folder: Path, part: str = "train") -> np.ndarray:
    return np.load(folder / f"{part}_images.npy")


def test_a_function_is_prepared_and_read_by_name(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when channels, sides or labels of a set of one's own are not those that it returned."""
    assert main(["prepare", f"{module}:flowers", "--root", str(tmp_path / "data")]) == 0
    assert f"{tmp_path}/data/own_flowers.flowers: 20 train, 6 test samples" in capsys.readouterr().out
    config = DataConfig(name=f"{module}:flowers", root=str(tmp_path / "data"), backend="ram", batch_size=4)
    info = dataset_info(config)
    assert info.classes == ("0", "1") and info.image_shape == (5, 4, 6) and len(info.mean) == 5
    images, labels = next(iter(open_loader(config, "test", seed=0)))
    expected = (np.arange(6 * 4 * 6 * 5).reshape(6, 4, 6, 5) + 7).astype(np.uint8)
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1), expected)
    assert labels.tolist() == [0, 1] * 3
    assert main(["verify", "own_flowers.flowers", "--root", str(tmp_path / "data")]) == 0


def test_a_changed_function_is_noticed(module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when a mended function trains on what the old one returned."""
    command = ["prepare", f"{module}:flowers", "--name", "f", "--root", str(tmp_path / "data")]
    assert main(command) == 0
    (tmp_path / "own_flowers.py").write_text(MODULE + "\n")
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "own_flowers.py (changed)" in error and error.rstrip().endswith("--name f --again")
    assert main([*command, "--again"]) == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["own_flowers:needs"], "missing a required argument: 'size'"),
        (["own_flowers:flowers", "--mean", "nan,0,0,0,0"], "--mean must be in [0, 1], got nan"),
        (["own_flowers:no_test"], "no test part: give one, or split some off with --test-fraction 0.2"),
        (["own_flowers:nothing"], "returned a list"),
        (["own_flowers:absent"], "cannot import own_flowers:absent"),
        (["own_flowers:flowers", "--test-fraction", "0.2"], "has a test part already"),
        (["own_flowers:flowers", "--name", "cifar10"], "the name of a known data set"),
        (["own_flowers:flowers", "--name", "a/b"], "no plain folder name"),
        (["own_flowers:flowers", "--mean", "0.5"], "has 1 numbers, the images have 5 channels"),
        (["nowhere"], "a folder of images, or package.module:function"),
        (["own_flowers:flowers", "--csv", "x.csv"], "no folder"),
        (["own_flowers:flowers", "--size", "0"], "size must be at least 1"),
    ],
)
def test_bad_sources_are_one_line(
    module: str, tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when a mistake ends in a traceback or leaves something behind."""
    assert main(["prepare", *arguments, "--root", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "data").exists() or not [p for p in (tmp_path / "data").iterdir() if p.suffix != ".lock"]


def test_a_name_stands_for_one_source_and_its_options(module: str, tmp_path: Path) -> None:
    """Fails when another function, or another size, is answered by what was there before."""
    function = f"{module}:no_test"
    prepare(function, tmp_path, name="f", options=Options(test_fraction=0.2, mean=(0.5,) * 5))
    prepare(function, tmp_path, name="f")
    assert "not from own_flowers:flowers" in error_of(lambda: prepare(f"{module}:flowers", tmp_path, name="f"))
    for options in (Options(test_fraction=0.3), Options(size=(9, 9)), Options(std=(1.0,) * 5), Options(channels=1)):
        assert "with --again" in error_of(
            lambda options=options: prepare(function, tmp_path, name="f", options=options)
        )
    assert read_manifest(tmp_path / "f").mean == (0.5,) * 5


PILLOW, GREY = Image.new("RGB", (6, 4), (1, 2, 3)), Image.new("L", (6, 4), 7)


@pytest.mark.parametrize(
    ("item", "shape", "pixel", "label"),
    [
        ((PILLOW, 1), (3, 4, 6), [1, 2, 3], 1),
        ((GREY, np.int64(1)), (1, 4, 6), [7], 1),
        ({"image": PILLOW, "label": "rose"}, (3, 4, 6), [1, 2, 3], "rose"),
        ({"img": GREY, "fine_label": 3, "coarse_label": 9}, (1, 4, 6), [7], 3),
        ((torch.full((2, 4, 6), 0.4), torch.tensor(1)), (2, 4, 6), [102, 102], 1),
        ((torch.full((4, 6), 9, dtype=torch.uint8), "x"), (1, 4, 6), [9], "x"),
        ((np.full((4, 6, 3), 512, np.uint16), 0), (3, 4, 6), [2, 2, 2], 0),
    ],
)
def test_items_as_data_sets_have_them(
    tmp_path: Path, item: Any, shape: tuple[int, ...], pixel: list[int], label: Any
) -> None:
    """Fails when axes are swapped, values clipped, or a dictionary's label is another column."""
    folder = write(tmp_path, "own", Squares(4, lambda i: item), Squares(2, lambda i: item))
    manifest = read_manifest(folder)
    assert manifest.image_shape == shape and manifest.classes == (str(label),)
    assert images_of(folder)[3, 2, 5].tolist() == pixel and verify("own", tmp_path) == []


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (3, "a int: return a pair"),
        ((GREY, 1.5), "its label is 1.5"),
        ((GREY, torch.tensor([0, 1])), "its label has the shape (2,)"),
        ((GREY, True), "its label is True"),
        ((torch.randn(3, 4, 6), 0), "leave normalisation out"),
        ((None, 0), "a NoneType for an image"),
        ({"picture": GREY, "label": 0}, "a dictionary with picture, label"),
    ],
)
def test_items_that_are_no_samples_are_named(tmp_path: Path, item: Any, told: str) -> None:
    """Fails when something is made of anything, or the user gets a traceback of ours."""
    torch.manual_seed(0)
    message = error_of(lambda: write(tmp_path, "own", Squares(4, lambda i: item), Squares(2)))
    assert told in message and "train sample 0" in message


def test_bad_items_are_named_and_left_out(tmp_path: Path) -> None:
    """Fails when labels shift against images behind a bad item, over the edges of chunks and processes too."""

    def make(i: int) -> Any:
        if i in (3, 12):
            raise KeyError("lost")
        return np.full((4, 5 if i == 7 else 6), i, np.uint8), i % 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_writer, "CHUNK_SAMPLES", 5)
        message = error_of(lambda: write(tmp_path, "own", Squares(17, make), Squares(6)))
        for told in ("3 image(s)", "train sample 3 (KeyError: 'lost')", "train sample 7 (4×5 pixels, wanted 4×6)"):
            assert told in message
        folder = write(tmp_path, "own", Squares(17, make), Squares(6), options=Options(skip_bad=True))
    kept = [i for i in range(17) if i not in (3, 7, 12)]
    assert images_of(folder)[:, 0, 0, 0].tolist() == kept
    assert np.load(folder / "train_labels.npy").tolist() == [i % 3 for i in kept]
    assert len(read_manifest(folder).skipped) == 3 and verify("own", tmp_path) == []
    assert not list(folder.glob("*.journal"))


def test_what_is_taken_to_test_on_is_told(tmp_path: Path) -> None:
    """Fails when a validation part is measured as the test part without a word, or test data are left alone."""
    own = Squares(4)
    for parts, told in (
        ({"train": own, "validation": own}, ("the test part is 'validation'",)),
        ({"train": own, "test": own, "unsupervised": own}, ("the test part is 'test'; left alone: unsupervised",)),
        ({"train": own, "test": own}, ()),
    ):
        assert read_values("own", parts).notes == told
    with pytest.raises(UserError, match="has test and no 'train'"):
        read_values("own", {"test": own})
    with pytest.raises(UserError, match=r"a generator without length or items"):
        read_values("own", {"train": (item for item in ())})
    with pytest.raises(UserError, match="3 images and 2 labels"):
        read_values("own", {"train": (np.zeros((3, 2, 2)), [0, 1])})


def test_random_transforms_are_refused(tmp_path: Path) -> None:
    """Fails when one random crop of each image is written and trained on for ever."""
    rng = np.random.default_rng(0)
    random = Squares(4, lambda i: (rng.integers(0, 256, (4, 6), dtype=np.uint8), 0))
    assert "another image each time" in error_of(lambda: write(tmp_path, "own", random, Squares(2)))


def test_values_are_not_written_over_others(tmp_path: Path) -> None:
    """Fails when a second call replaces, or silently keeps, what the first has written."""
    write(tmp_path, "own", Squares(4), Squares(2))
    assert "again=True" in error_of(lambda: write(tmp_path, "own", Squares(6), Squares(2)))
    assert len(images_of(write(tmp_path, "own", Squares(6), Squares(2), again=True))) == 6
    assert "not a" not in error_of(lambda: prepare("own", tmp_path))


def test_names_of_classes_are_those_of_the_data_set(tmp_path: Path) -> None:
    """Fails when torchvision's or Hugging Face's class names are lost, or numbers without names are given some."""
    torchvision = Squares(4)
    torchvision.classes = ["even", "odd"]  # type: ignore[attr-defined]
    hugging_face = Squares(4, lambda i: {"image": GREY, "label": i % 2})
    hugging_face.features = {"image": None, "label": SimpleNamespace(names=["e", "o"])}  # type: ignore[attr-defined]
    for name, own, classes, expected in (
        ("a", torchvision, None, ("even", "odd")),
        ("b", hugging_face, None, ("e", "o")),
        ("c", torchvision, ["x", "y"], ("x", "y")),
    ):
        assert read_manifest(write(tmp_path, name, own, own, classes=classes)).classes == expected


def test_test_labels_are_of_the_classes_that_they_name(tmp_path: Path) -> None:
    """Fails when the first class of a test part that lacks one is taken for the first training class."""
    train, test = Squares(6, lambda i: (GREY, i % 3)), Squares(4, lambda i: (GREY, i % 2))
    train.classes, test.classes = ["apple", "bird", "cat"], ["bird", "cat"]  # type: ignore[attr-defined]
    folder = write(tmp_path, "own", train, test)
    assert np.load(folder / "test_labels.npy").tolist() == [1, 2, 1, 2]
    assert np.load(folder / "train_labels.npy").tolist() == [0, 1, 2] * 2
    test.classes = ["bird", "dog"]  # type: ignore[attr-defined]
    assert "'dog'" in error_of(lambda: write(tmp_path, "own", train, test, again=True))
    for bad in ({"a": 0}, "ab", {"a", "b"}, ["a", 1]):
        told = error_of(lambda bad=bad: write(tmp_path, "own", train, test, classes=bad, again=True))
        assert "give a list of names" in told


def test_an_item_that_is_filled_again_is_copied(tmp_path: Path) -> None:
    """Fails when all images of a Dataset that reuses its buffer are the last one."""
    buffer = np.zeros((4, 6), np.uint8)

    def fill(i: int) -> Any:
        buffer[...] = i
        return buffer, i % 2

    folder = write(tmp_path, "own", Squares(5, fill), Squares(2))
    assert images_of(folder)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("source", ["function", "values"])
def test_who_waited_for_another_source_is_told(module: str, tmp_path: Path, source: str) -> None:
    """Fails when two processes prepare one name at once, and the second reports the first's data as its own."""

    def other_first(*args: object, **kwargs: object) -> bool:
        monkeypatch.undo()
        write(tmp_path, "own", Squares(4), Squares(2))
        return True

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("sfw_dist.data.prepare.make_folder", other_first)
        if source == "function":
            message = error_of(lambda: prepare(f"{module}:flowers", tmp_path, name="own"))
            assert "was prepared from values of Python, not from own_flowers:flowers" in message
        else:
            message = error_of(lambda: write(tmp_path, "own", Squares(6), Squares(2)))
            assert "written by another process meanwhile" in message


def test_a_folder_of_classes_is_split_by_names_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when one more image moves the test part, or the validation split, of all others."""
    photos, root = tmp_path / "photos", tmp_path / "data"
    for i in range(40):
        save_image(photos / "ab"[i % 2] / f"{i}.png", i, "L", size=(6, 4))
    command = ["prepare", str(photos), "--name", "own", "--root", str(root), "--test-fraction", "0.25"]

    def parts() -> dict[str, set[str]]:
        files = {part: json.loads((root / "own" / f"{part}_files.json").read_text()) for part in ("train", "test")}
        config = DataConfig(name="own", root=str(root), backend="ram", batch_size=4, validation_fraction=0.2)
        held_out = rank_sampler(config, "validation", seed=3, rank=0, world_size=1).ids(0)
        files["validation"] = [files["train"][i] for i in held_out]
        return {part: {Path(file).name for file in names} for part, names in files.items()}

    assert main(command) == 0
    assert "30 train, 10 test" in capsys.readouterr().out
    before = parts()
    manifest = read_manifest(root / "own")
    assert manifest.image_shape == (1, 4, 6) and manifest.classes == ("a", "b")
    save_image(photos / "a" / "0a.png", 99, "L", size=(6, 4))  # sorted in front
    assert main([*command, "--again"]) == 0
    after = parts()
    assert len(before["test"] - after["test"]) <= 1 and len(before["validation"] - after["validation"]) <= 1


def test_train_and_test_folders_of_one_s_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when several sets of folders, or several sizes of one, cannot stand below one root."""
    photos = tmp_path / "photos"
    for place in ("train/a/1", "train/b/2", "val/a/3"):
        save_image(photos / f"{place}.png", 9, size=(8, 8))
    save_image(photos / "train" / "a" / "big.png", 9, size=(20, 16))
    for name, options in (("p4", ["--size", "4"]), ("p6", ["--size", "6x4", "--channels", "1"])):
        assert main(["prepare", str(photos), "--name", name, "--root", str(tmp_path), *options]) == 0
    assert read_manifest(tmp_path / "p4").image_shape == (3, 4, 4)
    assert read_manifest(tmp_path / "p6").image_shape == (1, 6, 4)
    capsys.readouterr()
    assert main(["prepare", str(photos), "--name", "p", "--root", str(tmp_path)]) == 2
    assert "16×20 pixels, wanted 8×8" in (error := capsys.readouterr().err) and "--size N" in error


def test_a_killed_process_is_one_line(tmp_path: Path) -> None:
    """Fails when a process that ran out of memory ends prepare in a traceback, or leaves it waiting."""

    def make(i: int) -> Any:
        if i == 3 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return GREY, 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_writer, "CHUNK_SAMPLES", 2)
        message = error_of(lambda: write(tmp_path, "own", Squares(8, make), Squares(2)))
    assert "train cannot be read by several processes" in message and not (tmp_path / "own").exists()
