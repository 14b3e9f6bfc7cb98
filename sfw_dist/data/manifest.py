"""The folder of a prepared data set: its files and the manifest that describes them."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sfw_dist.data.datasets.raw import ImageFormat
from sfw_dist.data.datasets.registry import DATASETS
from sfw_dist.data.record import DataRecord
from sfw_dist.errors import UserError
from sfw_dist.files import write_text

FORMAT = 1
LEAST_STD = 1e-7
"""What earlier versions wrote for a constant channel is below it, or no number: a rounding error of at most 1.5e-8."""
MANIFEST = "manifest.json"

Part = Literal["train", "test"]
PARTS: tuple[Part, ...] = ("train", "test")
"""The parts on disk; the validation split is taken from train when a loader opens."""


def set_folder(root: Path | str, name: str) -> Path:
    """The folder of a prepared data set.

    Args:
        root: folder of all data sets.
        name: of the data set; an import path ``package.module:function`` has the folder ``package.module.function``.

    Raises:
        UserError: the name is no plain folder name.
    """
    plain = name.replace(":", ".")
    simple = Path(plain).name == plain and plain.isprintable() and len(plain) <= 100
    if not simple or plain in ("", "raw") or plain.startswith("."):
        raise UserError(f"data set {name!r} is no plain folder name: write up to 100 letters, digits, '_', '-', '.'")
    return Path(root) / plain


def images_file(part: Part) -> str:
    """Name of the file of images, uint8 ``(n, height, width, channels)``."""
    return f"{part}_images.npy"


def labels_file(part: Part) -> str:
    """Name of the file of labels, int64 ``(n,)``."""
    return f"{part}_labels.npy"


def beton_file(part: Part) -> str:
    """Name of the file of the same samples in FFCV's format; absent when FFCV was."""
    return f"{part}.beton"


def jpegs_file(part: Part) -> str:
    """Name of the file of where each JPEG lies in the beton, see :data:`sfw_dist.data.loading.jpeg.JPEG_ROW`."""
    return f"{part}_jpegs.npy"


def ids_file(part: Part) -> str:
    """Name of the file of what training samples are known by, uint64 ``(n,)``; absent for sets that never change."""
    return f"{part}_ids.npy"


def files_file(part: Part) -> str:
    """Name of the JSON list of each sample's image file, as a path from the data root; absent when there were none."""
    return f"{part}_files.json"


@dataclass(frozen=True)
class FileRecord:
    """Length and checksum of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: what the prepared folder holds."""

    name: str
    source: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """``(channels, height, width)``"""
    counts: dict[str, int]
    """Samples of train and test."""
    mean: tuple[float, ...]
    """Per channel, of the training images in units of [0, 1]; likewise ``std``."""
    std: tuple[float, ...]
    files: dict[str, FileRecord]
    skipped: tuple[str, ...] = ()
    """Source files that were left out as unusable, and why."""
    left_out: tuple[str, ...] = ()
    """Source files that were not taken for samples, and why."""
    notes: tuple[str, ...] = ()
    """What else people should know of the preparation: one sentence each."""
    arguments: tuple[str, ...] = ()
    """What the command ``prepare`` makes it from, besides the root; empty if another program has written it."""
    form: dict[str, bool] = field(default_factory=dict)
    """Whether images were brought to ``image_shape``: ``fit``, ``to_grey``."""
    store: Literal["raw", "jpeg"] = "raw"
    """What the files hold: pixels of ``image_shape``; or whole images as JPEGs, in betons, which the loader crops."""

    @property
    def image_format(self) -> ImageFormat:
        """How an image file becomes a sample."""
        fit = self.name == "imagefolder"  # of folders that earlier versions prepared
        return ImageFormat(*self.image_shape, **({"fit": fit} | self.form))

    @property
    def content(self) -> str:
        """A hash of what a network learns from and is measured with; the format of the files has no part in it."""
        held = (".npy", ".beton") if self.store == "jpeg" else ".npy"
        arrays = sorted((name, record.sha256) for name, record in self.files.items() if name.endswith(held))
        # As many digits as a network sees: the last bits of a mean depend on who has added.
        statistics = [f"{value:.7g}" for value in (*self.mean, *self.std)]
        facts = (self.classes, self.image_shape, statistics, arrays)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def record(self) -> DataRecord:
        """What a run remembers of it."""
        return DataRecord(
            self.name, self.content, self.classes, self.image_shape, self.mean, self.std, dict(self.counts)
        )

    @property
    def has_betons(self) -> bool:
        """Whether the samples are there in FFCV's format too."""
        return all(beton_file(part) in self.files for part in PARTS)

    @property
    def has_image_files(self) -> bool:
        """Whether each sample was decoded from an image file of its own."""
        return all(files_file(part) in self.files for part in PARTS)

    def save(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder``."""
        text = json.dumps({"format": FORMAT} | asdict(self), indent=2) + "\n"
        write_text(folder / MANIFEST, text)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a prepared data set.

    Raises:
        UserError: the data set is not prepared in ``folder``, or the manifest is damaged.
    """
    path = folder / MANIFEST
    try:
        fields = json.loads(path.read_bytes())
        if fields.pop("format") != FORMAT:
            raise ValueError(f"wanted format {FORMAT}")
        for key in ("classes", "image_shape", "mean", "std"):
            fields[key] = tuple(fields[key])
        for key in ("skipped", "left_out", "notes", "arguments"):  # absent in manifests of earlier versions
            fields[key] = tuple(fields.get(key, ()))
        fields["std"] = tuple(std if std > LEAST_STD else 1.0 for std in fields["std"])
        fields["files"] = {name: FileRecord(**record) for name, record in fields["files"].items()}
        numbers = [*fields["image_shape"], *fields["mean"], *fields["std"], *(fields["counts"][part] for part in PARTS)]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("counts, shape, mean or std are no numbers")
        return Manifest(**fields)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"data set {folder.name!r} is not prepared in {folder}: {prepare_command(folder)}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): {prepare_again(folder)}") from None


def read_files(folder: Path, part: Part) -> list[str]:
    """Read the image file of each sample of ``part``, as a path from the data root.

    Raises:
        UserError: the list is damaged.
    """
    path = folder / files_file(part)
    try:
        files: list[str] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): {prepare_again(folder)}") from None
    return files


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Check the lengths of all files, which is cheap.

    Raises:
        UserError: a file is missing, truncated or too long.
    """
    for name, record in manifest.files.items():
        check_size(folder / name, record)


def check_size(path: Path, record: FileRecord) -> None:
    """Check the length of a file.

    Raises:
        UserError: the file is missing or not as long as recorded.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: {prepare_again(path.parent)}")
    size = path.stat().st_size
    if size != record.bytes:
        raise UserError(f"{path} has {size} bytes instead of {record.bytes}: {prepare_again(path.parent)}")


def check_content(path: Path, record: FileRecord) -> None:
    """Check every byte of a file.

    Raises:
        UserError: the file is missing or not the one that was recorded.
    """
    check_size(path, record)
    if file_record(path).sha256 != record.sha256:
        raise UserError(f"{path} is damaged (its sha256 is not the manifest's): {prepare_again(path.parent)}")


def prepare_command(folder: Path) -> str:
    """The remedy for a data set that is missing, for the end of an error message."""
    return _remedy(folder, ())


def prepare_again(folder: Path) -> str:
    """The remedy for a data set that is damaged, with the options of its preparation, for the end of a message."""
    fields, options = _fields(folder), []
    size = fitted_size(folder)
    if size and "arguments" not in fields and folder.name in DATASETS and DATASETS[folder.name].any_size:
        options = ["--size", size_text(size)]
    return _remedy(folder, [*options, *(["--skip-bad"] if fields.get("skipped") else []), "--again"])


def _remedy(folder: Path, options: Sequence[str]) -> str:
    stored = _fields(folder).get("arguments")
    if not stored and folder.name in DATASETS:
        stored = [folder.name]
    if stored:
        source, *given = stored
        command = ["python", "-m", "sfw_dist.data", "prepare", source, "--root", str(folder.parent), *given, *options]
        return f"run {shlex.join(command)}"
    if folder.is_dir():
        return "write it again as it was written"
    there = {path.parent.name for path in folder.parent.glob(f"*/{MANIFEST}")}
    return (
        f"prepare it with python -m sfw_dist.data prepare SOURCE --name {folder.name} --root {folder.parent}, or take "
        f"one of {', '.join(sorted(there | set(DATASETS)))}"
    )


def size_text(size: tuple[int, int]) -> str:
    """Height and width as ``--size`` takes them.

    Example:
        >>> size_text((64, 64)), size_text((48, 64))
        ('64', '48x64')
    """
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


def fitted_size(folder: Path) -> tuple[int, int] | None:
    """Height and width to which the images of a folder, which may be damaged, were scaled.

    Returns:
        ``None`` if they were not scaled, or neither manifest nor images tell.
    """
    fields = _fields(folder)
    form, shape = fields.get("form"), fields.get("image_shape")
    if isinstance(form, dict) and not form.get("fit"):
        return None
    if isinstance(shape, list) and len(shape) == 3 and all(isinstance(side, int) for side in shape):
        return shape[1], shape[2]
    try:
        with (folder / images_file("train")).open("rb") as file:
            np.lib.format.read_magic(file)
            (_, height, width, *_), _, _ = np.lib.format.read_array_header_1_0(file)
            return int(height), int(width)
    except (OSError, ValueError):
        return None


def _fields(folder: Path) -> dict[str, Any]:
    """The manifest's fields, unchecked; empty if there are none."""
    try:
        fields = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def file_record(path: Path) -> FileRecord:
    """Measure and hash a file."""
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
