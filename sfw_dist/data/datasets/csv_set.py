"""Reader of a table of images: a CSV file with a line for each, and the folder that the images are in."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sfw_dist.data.datasets.image_listing import list_images
from sfw_dist.data.datasets.image_sets import Samples, listed
from sfw_dist.data.datasets.raw import RawData
from sfw_dist.errors import UserError

PARTS = {"train": "train", "training": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}
"""What a split column may say, and which part is meant."""


@dataclass(frozen=True)
class Table:
    """A CSV file whose first line names the columns."""

    path: Path
    image_column: str = "image"
    """Holds the path of each image from the folder of images."""
    label_column: str = "label"
    """Holds the name of each image's class."""
    split_column: str | None = None
    """Says of each image ``train`` or ``test`` (or ``val``); ``None``: the test part is split off later."""


def read_table(folder: Path, table: Table) -> RawData:
    """List the images of a table.

    The classes are the labels of training images, sorted: by value if all are integers, else as text.

    Args:
        folder: of the images.
        table: one line for each image.

    Raises:
        UserError: the file cannot be read or has no such column; a line has no image or label, an image of another
            line or an unknown part; or a test image has a class without training images.
    """
    samples: dict[str, Samples] = {"train": [], "test": []}
    lines: dict[Path, int] = {}
    for number, image, label, split in _rows(table):
        path = Path(os.path.normpath(folder / image))
        if path in lines:
            raise UserError(f"{table.path}:{number}: {image} is in line {lines[path]} too: leave one line out")
        lines[path] = number
        samples[split].append((path, label))
    if not samples["train"] or (table.split_column and not samples["test"]):
        part = "test" if samples["train"] else "train"
        raise UserError(f"{table.path} has no line for {part}: add some, or split them off with --test-fraction 0.2")
    classes = _sorted_classes({label for _, label in samples["train"]})
    strange = next((sample for sample in samples["test"] if sample[1] not in classes), None)
    if strange:
        raise UserError(
            f"{table.path}:{lines[strange[0]]}: no training image has the class {strange[1]!r} of this test image: "
            "add some, or remove the line"
        )
    raw = listed(folder, samples["train"], samples["test"] if table.split_column else None, classes)
    there = list_images(folder)
    unlisted = [f"{path} (not in {table.path.name})" for path in there.images if path not in lines]
    others = [text for text in there.left_out if not text.startswith(f"{table.path} ")]
    return raw._replace(files=(table.path,), left_out=(*unlisted, *others))


def _rows(table: Table) -> list[tuple[int, str, str, str]]:
    """Line number, image, label and part of each line."""
    rows = []
    try:
        with table.path.open(newline="", encoding="utf-8-sig") as file:  # Excel writes a byte order mark
            reader = csv.DictReader(file)
            names = _checked_columns(table, reader.fieldnames or [])
            for row in reader:
                if not any(map(str.strip, filter(None, row.values() if None not in row else ["x"]))):
                    continue  # a line of blanks
                if None in row:
                    raise UserError(f"{table.path}:{reader.line_num}: more fields than columns: quote what has a comma")
                image, label = ((row[name] or "").strip() for name in names)
                if "\0" in image:
                    raise UserError(f"{table.path}:{reader.line_num}: no path ({image!r}): save it as CSV in UTF-8")
                empty = table.image_column if not image else table.label_column if not label else ""
                if empty:
                    raise UserError(f"{table.path}:{reader.line_num}: no {empty}: fill it in, or remove the line")
                rows.append((reader.line_num, image, label, _part(table, reader.line_num, row)))
    except FileNotFoundError:
        raise UserError(f"--csv {table.path} is not there: write the path of the table") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table.path} cannot be read ({error}): save it as CSV in UTF-8") from None
    return rows


def _checked_columns(table: Table, there: Sequence[str]) -> tuple[str, str]:
    for option, name in (("image", table.image_column), ("label", table.label_column), ("split", table.split_column)):
        if name is not None and name not in there:
            raise UserError(
                f"{table.path} has no column {name!r}: choose one of {', '.join(there) or 'none'} by --{option}-column"
            )
        if name is not None and list(there).count(name) > 1:
            raise UserError(f"{table.path} has {list(there).count(name)} columns {name!r}: rename one")
    return table.image_column, table.label_column


def _part(table: Table, number: int, row: dict[str, str]) -> str:
    if table.split_column is None:
        return "train"
    said = (row[table.split_column] or "").strip()
    if said.lower() not in PARTS:
        raise UserError(f"{table.path}:{number}: {table.split_column} is {said!r}: write train or test")
    return PARTS[said.lower()]


def _sorted_classes(labels: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))
