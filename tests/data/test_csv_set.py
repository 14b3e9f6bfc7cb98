"""A table of images: which lines are samples, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sfw_dist.data import Options, Table
from sfw_dist.data.manifest import read_manifest
from sfw_dist.data.prepare import prepare
from tests.support.downloads import error_of
from tests.support.raw_data import save_image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(6):
        save_image(tmp_path / "photos" / "deep" / f"{i}.png", 10 * i, "L", size=(6, 4))
    return tmp_path / "photos"


def table(photos: Path, text: str, split: str | None = "split") -> Table:
    path = photos.parent / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return Table(path, "file", "species", split)


def test_lines_are_samples(photos: Path, tmp_path: Path) -> None:
    """Fails when labels and images are joined by order instead of by line, or what is not listed is taken."""
    lines = [
        "\ufefffile,species,split",
        "deep/3.png, rose ,train",
        "deep/1.png,lily,train",
        " ,",
        "",
        'deep/2.png,"rose",VAL',
    ]
    folder = prepare(photos, tmp_path, name="own", table=table(photos, "\r\n".join(lines) + "\r\n"))
    manifest = read_manifest(folder)
    assert manifest.classes == ("lily", "rose") and manifest.image_shape == (1, 4, 6)
    assert (np.load(folder / "train_images.npy").mean(axis=(1, 2, 3)) // 10).tolist() == [3, 1]
    assert np.load(folder / "train_labels.npy").tolist() == [1, 0] and np.load(folder / "test_labels.npy") == [1]
    assert sorted(manifest.left_out) == [f"{photos}/deep/{i}.png (not in labels.csv)" for i in (0, 4, 5)]


def test_numbers_are_sorted_as_numbers_and_a_part_is_split_off(photos: Path, tmp_path: Path) -> None:
    """Fails when class 10 comes before class 2, or --test-fraction does not reach tables."""
    lines = ["file,species"] + [f"deep/{i}.png,{(2, 10)[i % 2]}" for i in range(6)]
    own = table(photos, "\n".join(lines), split=None)
    manifest = read_manifest(prepare(photos, tmp_path, name="own", table=own, options=Options(test_fraction=0.34)))
    assert manifest.classes == ("2", "10") and manifest.counts == {"train": 4, "test": 2}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("file,label,split\n", "no column 'species': choose one of file, label, split by --label-column"),
        ("", "no column 'file'"),
        ("file,species,split\na.png,x,train\na.png,y,test\n", "labels.csv:3: a.png is in line 2 too"),
        ("file,species,split\na.png,,train\n", "labels.csv:2: no species"),
        ("file,species,split\n,x,train\n", "labels.csv:2: no file"),
        ("file,species,split\na.png,x\n", "labels.csv:2: split is ''"),
        ("file,species,split\na.png,x,dev\n", "split is 'dev': write train or test"),
        ("file,species,split\na.png,x,train\n", "no line for test"),
        ("file,species,split,species\na.png,x,train,y\n", "has 2 columns 'species'"),
        ("file,species,split\na.png,x, y,train\n", "labels.csv:2: more fields than columns"),
        ("file,species,split\na.png,x,train\nb/../a.png,x,train\n", "labels.csv:3: b/../a.png is in line 2 too"),
        ("file,species,split\na\0.png,x,train\n", "labels.csv:2: no path"),
        ("file,species,split\na.png,x,train\nb.png,y,test\n", "labels.csv:3: no training image has the class 'y'"),
        ("file,species,split\ndeep/0.png,x,train\nno.png,x,test\n", "no.png (missing)"),
    ],
)
def test_bad_tables_are_named_by_line(photos: Path, tmp_path: Path, text: str, told: str) -> None:
    """Fails when a mistake in a table becomes a wrong label, or the line is not told."""
    assert told in error_of(lambda: prepare(photos, tmp_path, name="own", table=table(photos, text)))


def test_a_table_that_cannot_be_read_is_named(photos: Path, tmp_path: Path) -> None:
    """Fails when another encoding or a missing file is a traceback."""
    own = table(photos, "")
    own.path.write_bytes("file,species,split\nbläh".encode("latin-1"))
    assert "save it as CSV in UTF-8" in error_of(lambda: prepare(photos, tmp_path, name="own", table=own))
    own.path.unlink()
    assert "is not there" in error_of(lambda: prepare(photos, tmp_path, name="own", table=own))
