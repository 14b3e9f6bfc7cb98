"""The folder of a prepared data set: its files and the manifest that describes them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sfw_dist.errors import UserError
from sfw_dist.files import write_text

FORMAT = 1
MANIFEST = "manifest.json"

Part = Literal["train", "test"]
PARTS: tuple[Part, ...] = ("train", "test")
"""The parts on disk; the validation split is drawn from train when a loader opens."""


def images_file(part: Part) -> str:
    """uint8 ``(n, height, width, channels)``"""
    return f"{part}_images.npy"


def labels_file(part: Part) -> str:
    """int64 ``(n,)``"""
    return f"{part}_labels.npy"


def beton_file(part: Part) -> str:
    """The same samples in FFCV's format; absent when FFCV was."""
    return f"{part}.beton"


def files_file(part: Part) -> str:
    """The image file of each sample, as a JSON list of paths from the data root; absent where there were none."""
    return f"{part}_files.json"


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: what is in the folder beside it."""

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

    @property
    def has_betons(self) -> bool:
        return all(beton_file(part) in self.files for part in PARTS)

    @property
    def has_image_files(self) -> bool:
        return all(files_file(part) in self.files for part in PARTS)

    def save(self, folder: Path) -> None:
        text = json.dumps({"format": FORMAT} | asdict(self), indent=2) + "\n"
        write_text(folder / MANIFEST, text)


def read_manifest(folder: Path) -> Manifest:
    """The manifest in ``folder``; raises :class:`UserError` when the data set is not prepared, or it is damaged."""
    path = folder / MANIFEST
    try:
        fields = json.loads(path.read_bytes())
        if fields.pop("format") != FORMAT:
            raise ValueError(f"wanted format {FORMAT}")
        for key in ("classes", "image_shape", "mean", "std"):
            fields[key] = tuple(fields[key])
        fields["skipped"] = tuple(fields.get("skipped", ()))
        fields["files"] = {name: FileRecord(**record) for name, record in fields["files"].items()}
        return Manifest(**fields)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"data set {folder.name!r} is not prepared in {folder}: {prepare_command(folder)}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): {prepare_again(folder)}") from None


def read_files(folder: Path, part: Part) -> list[str]:
    """The image file of each sample of ``part``, from the data root; raises :class:`UserError` when damaged."""
    path = folder / files_file(part)
    try:
        files: list[str] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): {prepare_again(folder)}") from None
    return files


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """The cheap check before use. Raises :class:`UserError` for a missing, truncated or overlong file."""
    for name, record in manifest.files.items():
        check_size(folder / name, record)


def check_size(path: Path, record: FileRecord) -> None:
    """Raises :class:`UserError` when the file is missing or not as long as recorded."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {prepare_again(path.parent)}")
    size = path.stat().st_size
    if size != record.bytes:
        raise UserError(f"{path} has {size} bytes instead of {record.bytes}: {prepare_again(path.parent)}")


def check_content(path: Path, record: FileRecord) -> None:
    """Raises :class:`UserError` when the file is not byte for byte the one that was recorded."""
    check_size(path, record)
    if file_record(path).sha256 != record.sha256:
        raise UserError(f"{path} is damaged (its sha256 is not the manifest's): {prepare_again(path.parent)}")


def prepare_command(folder: Path) -> str:
    return f"run python -m sfw_dist.data prepare {folder.name} --root {folder.parent}"


def prepare_again(folder: Path) -> str:
    return f"delete the folder {folder} and {prepare_command(folder)}"


def file_record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
