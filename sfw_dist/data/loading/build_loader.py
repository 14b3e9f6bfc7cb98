"""Builds the loader of one split on one rank from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from sfw_dist.data.loading.augment import Augmentation, SampleParams
from sfw_dist.data.loading.backend import Backend
from sfw_dist.data.loading.ffcv_probe import ffcv_installed, ffcv_problem
from sfw_dist.data.loading.folder import FolderBackend
from sfw_dist.data.loading.gpu import GPUBackend
from sfw_dist.data.loading.jpeg import JPEG_ROW, JpegBackend, JpegFile, jpeg_params
from sfw_dist.data.loading.loader import Loader, ShardedLoader
from sfw_dist.data.loading.memmap import MemmapBackend
from sfw_dist.data.loading.prefetch import loader_threads
from sfw_dist.data.loading.stage import staged
from sfw_dist.data.manifest import (
    Manifest,
    Part,
    beton_file,
    check_sizes,
    ids_file,
    images_file,
    jpegs_file,
    labels_file,
    prepare_again,
    prepare_command,
    read_files,
    read_manifest,
    set_folder,
)
from sfw_dist.data.record import DataRecord
from sfw_dist.data.sampler import EvaluationSampler, Ids, Sampler, TrainingSampler, split_validation
from sfw_dist.errors import UserError

if TYPE_CHECKING:
    from sfw_dist.config import DataConfig

Split = Literal["train", "validation", "test"]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class DatasetInfo:
    """What a model and its input normalisation need to know about a data set."""

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """``(channels, height, width)``"""
    mean: tuple[float, ...]
    """Per channel, of the training images in units of [0, 1]; likewise ``std``."""
    std: tuple[float, ...]
    counts: dict[Split, int]
    """Samples of each split, over all ranks."""
    record: DataRecord
    """What a run remembers of the data set."""


def dataset_info(config: DataConfig) -> DatasetInfo:
    """Read the facts about a prepared data set.

    Args:
        config: its name, folder and validation fraction are used.

    Raises:
        UserError: the data set is not prepared, or is damaged.
    """
    folder, manifest = _open_folder(config)
    train, validation = _split_training(config, folder, manifest, seed=0)
    counts: dict[Split, int] = {
        "train": len(train),
        "validation": len(validation),
        "test": manifest.counts["test"],
    }
    return DatasetInfo(manifest.classes, manifest.image_shape, manifest.mean, manifest.std, counts, manifest.record)


def open_loader(
    config: DataConfig, split: Split, *, seed: int, rank: int = 0, world_size: int = 1, device: torch.device = CPU
) -> Loader:
    """Open the batches of one split for one rank.

    Training samples are shuffled and augmented; validation and test samples are neither.

    Args:
        config: data set, backend, batch sizes and augmentation.
        split: train, validation or test.
        seed: of the permutations, the augmentation and the validation split; the same on every rank.
        rank: this rank.
        world_size: number of ranks.
        device: where the batches are used. For a GPU they come in page-locked memory; the gpu backend makes them there.

    Raises:
        UserError: the data set is not prepared or damaged, the backend is not available, or a rank has no samples.
    """
    sampler = rank_sampler(config, split, seed=seed, rank=rank, world_size=world_size)
    folder, manifest = _open_folder(config)
    part = _part(split)
    name, why = _choose(config, folder, manifest, device)
    place = folder
    if config.stage_dir and name != "folder":
        place = staged(folder, manifest, Path(config.stage_dir), _backend_files(name, manifest, part))
    labels = _labels(folder, manifest, part)
    augmentation = Augmentation()
    if split == "train":
        augmentation = Augmentation(config.crop_padding, config.flip, config.cutout, config.random_resized_crop)
    choose_params: Callable[..., SampleParams] = augmentation.sample_params
    if manifest.store == "jpeg":
        jpegs = _jpegs(place, manifest, part)
        backend = _open_jpegs(name, jpegs, labels, manifest.image_shape)
        choose_params = partial(jpeg_params, augmentation, jpegs.table)
    else:
        backend = _open_backend(name, place, manifest, part, labels, device)
    threads = loader_threads(config.workers) if backend.threaded else 0
    return ShardedLoader(
        backend,
        sampler,
        sample_params=lambda ids, epoch: choose_params(ids, manifest.image_shape[1:], seed=seed, epoch=epoch),
        name=_namer(folder, manifest, part),
        threads=threads,
        stall_timeout=config.stall_timeout,
        pin_for=device if device.type == "cuda" and name != "gpu" else None,
        description=f"{name}, {threads} thread(s){why}",
    )


def rank_sampler(config: DataConfig, split: Split, *, seed: int, rank: int, world_size: int) -> Sampler:
    """The samples that ``rank`` reads; takes and raises what :func:`open_loader` does, but opens no backend."""
    assert 0 <= rank < world_size
    folder, manifest = _open_folder(config)
    members = _members(config, split, folder, manifest, seed)
    if split == "train":
        return TrainingSampler(members, config.batch_size, seed, rank, world_size)
    return EvaluationSampler(members, config.eval_batch_size, rank, world_size)


def _part(split: Split) -> Part:
    return "test" if split == "test" else "train"


def _open_folder(config: DataConfig) -> tuple[Path, Manifest]:
    folder = set_folder(config.root, config.name)
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    return folder, manifest


def _members(config: DataConfig, split: Split, folder: Path, manifest: Manifest, seed: int) -> Ids:
    if split == "test":
        return np.arange(manifest.counts["test"])
    train, validation = _split_training(config, folder, manifest, seed)
    if split == "train":
        return train
    if len(validation) == 0:
        fraction = config.validation_fraction
        remedy = "no class has two training images, write 0" if fraction else "write 0.1 for 10 %"
        raise UserError(f"data.validation_fraction {fraction} leaves no validation split: {remedy}")
    return validation


def _split_training(config: DataConfig, folder: Path, manifest: Manifest, seed: int) -> tuple[Ids, Ids]:
    labels, identities = _labels(folder, manifest, "train"), None
    if ids_file("train") in manifest.files:
        identities = _load_array(folder / ids_file("train"), np.uint64, (len(labels),))
    return split_validation(labels, config.validation_fraction, seed, identities)


def _choose(config: DataConfig, folder: Path, manifest: Manifest, device: torch.device) -> tuple[str, str]:
    """The backend to open and, with ``backend: auto``, why; raises :class:`UserError` for one that is not available."""
    if manifest.store == "jpeg" and config.backend in ("gpu", "folder"):
        raise UserError(
            f"data.backend {config.backend}: {manifest.name} is stored as JPEGs, which ffcv and ram decode: write "
            "data.backend auto"
        )
    if config.backend in ("auto", "ffcv"):
        problem = _ffcv_problem(folder, manifest)
        if problem is None:
            return "ffcv", " (auto: FFCV passed its probe)" if config.backend == "auto" else ""
        if config.backend == "auto":
            return "ram", f" (auto: no FFCV: {problem})"
        raise UserError(f"data.backend ffcv: {problem}; or write data.backend ram")
    if config.backend == "gpu" and device.type == "cpu":
        raise UserError("data.backend gpu needs a GPU, and torch finds none: write data.backend ram")
    if config.backend == "folder" and not manifest.has_image_files:
        raise UserError(
            f"data.backend folder: {manifest.name} was not prepared from image files: write data.backend ram"
        )
    return config.backend, ""


def _ffcv_problem(folder: Path, manifest: Manifest) -> str | None:
    if manifest.has_betons or not ffcv_installed():
        return ffcv_problem(folder.parent)
    return f"prepared without it: {prepare_command(folder)}"


def _backend_files(name: str, manifest: Manifest, part: Part) -> list[str]:
    if manifest.store == "jpeg":
        return [beton_file(part), jpegs_file(part)]
    return [beton_file(part) if name == "ffcv" else images_file(part)]


def _open_backend(
    name: str, folder: Path, manifest: Manifest, part: Part, labels: Ids, device: torch.device
) -> Backend:
    match name:
        case "ffcv":
            from sfw_dist.data.loading.ffcv import FFCVBackend

            return FFCVBackend(folder / beton_file(part), labels, manifest.image_shape)
        case "ram":
            return MemmapBackend(_images(folder, manifest, part), labels)
        case "folder":
            files = [folder.parent / file for file in read_files(folder, part)]
            return FolderBackend(files, labels, manifest.image_format)
        case _:
            return GPUBackend(_images(folder, manifest, part), labels, device)


def _jpegs(folder: Path, manifest: Manifest, part: Part) -> JpegFile:
    path = folder / jpegs_file(part)
    jpegs = JpegFile(folder / beton_file(part), _load_array(path, JPEG_ROW, (manifest.counts[part],), mmap_mode="c"))
    if not jpegs.fits():
        raise UserError(f"{path} is damaged (an address is out of range): {prepare_again(folder)}")
    return jpegs


def _open_jpegs(name: str, jpegs: JpegFile, labels: Ids, image_shape: tuple[int, int, int]) -> Backend:
    if name == "ram":
        return JpegBackend(jpegs, labels, image_shape)
    from sfw_dist.data.loading.ffcv import FFCVJpegBackend

    return FFCVJpegBackend(jpegs, labels, image_shape)


def _namer(folder: Path, manifest: Manifest, part: Part) -> Callable[[int], str]:
    """Names samples for messages: by number, and by image file where there is one."""

    def name(sample: int) -> str:
        file = f" ({folder.parent / read_files(folder, part)[sample]})" if manifest.has_image_files else ""
        return f"{manifest.name} {part} sample {sample}{file}"

    return name


def _images(folder: Path, manifest: Manifest, part: Part) -> NDArray[np.uint8]:
    channels, height, width = manifest.image_shape
    shape = (manifest.counts[part], height, width, channels)
    # Copy on write, because torch takes only writable arrays; nothing writes, so the pages stay shared.
    return _load_array(folder / images_file(part), np.uint8, shape, mmap_mode="c")


def _labels(folder: Path, manifest: Manifest, part: Part) -> Ids:
    labels = _load_array(folder / labels_file(part), np.int64, (manifest.counts[part],))
    if labels.min() < 0 or labels.max() >= len(manifest.classes):
        raise UserError(f"{folder / labels_file(part)} is damaged (a label is out of range): {prepare_again(folder)}")
    return labels


def _load_array(
    path: Path, dtype: DTypeLike, shape: tuple[int, ...], mmap_mode: Literal["c"] | None = None
) -> NDArray[Any]:
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"{array.dtype} {array.shape}, wanted {np.dtype(dtype)} {shape}")
    except Exception as error:  # of a damaged header numpy raises whatever Python's parser does
        raise UserError(f"{path} is damaged ({error}): {prepare_again(path.parent)}") from None
    return array
