"""Loaders: what a training loop iterates over, one class for every backend, split and world size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sfw_dist.data.augment import crop_flip
from sfw_dist.data.manifest import (
    Manifest,
    Part,
    beton_file,
    check_sizes,
    images_file,
    labels_file,
    prepare_again,
    prepare_command,
    read_manifest,
)
from sfw_dist.data.order import EvaluationOrder, Ids, Order, TrainingOrder, split_validation
from sfw_dist.data.registry import find_dataset
from sfw_dist.data.torch import TorchBackend
from sfw_dist.errors import UserError

if TYPE_CHECKING:
    from sfw_dist.config import DataConfig

Split = Literal["train", "validation", "test"]
Batch = tuple[Tensor, Tensor]
"""Images uint8 ``(batch, channels, height, width)`` in channels_last, labels int64 ``(batch,)``; both on the CPU."""


class Loader(Protocol):
    """The batches of one rank, epoch by epoch."""

    samples: int
    """Samples that this rank yields in an epoch."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the current epoch; the caller may keep the tensors."""

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch, which decides order and augmentation."""

    def state_dict(self) -> dict[str, int]:
        """``{"epoch", "batch"}``: the epoch, and how many of its batches have been yielded."""

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The next iteration continues there, without decoding what came before."""

    def close(self) -> None:
        """Stop the threads; the loader cannot be used afterwards."""


class Backend(Protocol):
    """Fetches samples by id; knows neither ranks nor epochs."""

    def batches(self, ids: Ids) -> Generator[Batch, None, None]:
        """The samples ``ids``, in this order, in batches of the size given at construction.

        Closing the generator releases what the epoch holds. The tensors are new, never views of a reused buffer.
        """

    def close(self) -> None:
        """Release everything."""


class ShardedLoader:
    """A :class:`Loader`: the ids of an order, fetched by a backend, then augmented.

    ``augment(images, ids, epoch=…)`` returns the images to yield. ``backend`` makes batches of ``order.batch_size``.
    """

    def __init__(self, backend: Backend, order: Order, augment: Callable[..., Tensor] | None = None) -> None:
        self._backend, self._order, self._augment = backend, order, augment
        self.samples = order.samples
        self._epoch = 0
        self._yielded = 0  # batches of the epoch so far
        self._resume_at = 0  # where the next iteration starts

    def __len__(self) -> int:
        return -(-self.samples // self._order.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        epoch, size, start = self._epoch, self._order.batch_size, self._resume_at
        self._resume_at, self._yielded = 0, start
        ids = self._order.ids(epoch)[start * size :]
        with closing(self._backend.batches(ids)) as batches:
            for i, (images, labels) in enumerate(batches):
                if self._augment is not None:
                    images = self._augment(images, ids[i * size : (i + 1) * size], epoch=epoch)
                self._yielded += 1
                yield images, labels

    def set_epoch(self, epoch: int) -> None:
        """Another epoch starts at its first batch; the same one keeps the place that ``load_state_dict`` set."""
        if epoch != self._epoch:
            self._epoch, self._yielded, self._resume_at = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "batch": self._yielded}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        epoch, batch = state["epoch"], state["batch"]
        if not 0 <= batch <= len(self):
            raise UserError(
                f"the saved loader stands at batch {batch} but an epoch has {len(self)} batches: "
                "resume with the data set and data.batch_size of the saved run"
            )
        self._epoch, self._yielded, self._resume_at = epoch, batch, batch

    def close(self) -> None:
        self._backend.close()


@dataclass(frozen=True)
class DatasetInfo:
    """What a model and its input normalisation need to know of a data set."""

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """``(channels, height, width)``"""
    mean: tuple[float, ...]
    """Per channel, of the training images in units of [0, 1]; likewise ``std``."""
    std: tuple[float, ...]
    counts: dict[Split, int]
    """Samples of each split, over all ranks."""


def dataset_info(config: DataConfig) -> DatasetInfo:
    """The facts of the prepared data set; raises :class:`UserError` when it is not prepared or is damaged."""
    folder, manifest = _open_folder(config)
    train, validation = split_validation(_labels(folder, manifest, "train"), config.validation_fraction, seed=0)
    counts: dict[Split, int] = {
        "train": len(train),
        "validation": len(validation),
        "test": manifest.counts["test"],
    }
    return DatasetInfo(manifest.classes, manifest.image_shape, manifest.mean, manifest.std, counts)


def open_loader(config: DataConfig, split: Split, *, seed: int, rank: int = 0, world_size: int = 1) -> Loader:
    """The batches of ``split`` for ``rank``: train is shuffled and augmented, validation and test are neither.

    ``seed`` draws order, augmentation and the validation split, which is the same on every rank. Raises
    :class:`UserError`: the data set is not prepared or damaged, the backend is not there, or a rank's share is empty.
    """
    assert 0 <= rank < world_size
    folder, manifest = _open_folder(config)
    part: Part = "test" if split == "test" else "train"
    labels = _labels(folder, manifest, part)
    members = _members(config, split, labels, seed)
    order: Order
    if split == "train":
        order = TrainingOrder(members, config.batch_size, seed, rank, world_size)
    else:
        order = EvaluationOrder(members, config.eval_batch_size, rank, world_size)
    augmented = split == "train" and (config.crop_padding > 0 or config.flip)
    augment = partial(crop_flip, seed=seed, padding=config.crop_padding, flip=config.flip) if augmented else None
    return ShardedLoader(_open_backend(config, folder, manifest, part, labels, order.batch_size), order, augment)


def _open_folder(config: DataConfig) -> tuple[Path, Manifest]:
    folder = Path(config.root) / find_dataset(config.name).name
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    return folder, manifest


def _members(config: DataConfig, split: Split, labels: Ids, seed: int) -> Ids:
    if split == "test":
        return np.arange(len(labels))
    train, validation = split_validation(labels, config.validation_fraction, seed)
    if split == "train":
        return train
    if len(validation) == 0:
        raise UserError(
            f"data.validation_fraction {config.validation_fraction} leaves no validation split: write 0.1 for 10 %"
        )
    return validation


def _open_backend(
    config: DataConfig, folder: Path, manifest: Manifest, part: Part, labels: Ids, batch_size: int
) -> Backend:
    if config.backend != "torch":
        try:
            from sfw_dist.data.ffcv import FFCVBackend
        except (ImportError, OSError) as error:
            reason = " ".join(str(error).split())
            problem = (
                f"FFCV cannot be imported ({reason}): apt-get install pkg-config libopencv-dev libturbojpeg0-dev, then "
                "pip install ffcv; or write data.backend torch"
            )
        else:
            if manifest.has_betons:
                return FFCVBackend(
                    folder / beton_file(part),
                    labels,
                    manifest.image_shape,
                    batch_size=batch_size,
                    workers=config.workers,
                )
            problem = f"{folder} was prepared without FFCV: {prepare_command(folder)}"
        if config.backend == "ffcv":
            raise UserError(f"data.backend ffcv: {problem}")
        warnings.warn(f"data.backend auto takes torch: {problem}", stacklevel=3)
    return TorchBackend(_images(folder, manifest, part), labels, batch_size=batch_size)


def _images(folder: Path, manifest: Manifest, part: Part) -> NDArray[np.uint8]:
    channels, height, width = manifest.image_shape
    shape = (manifest.counts[part], height, width, channels)
    return _load_array(folder / images_file(part), np.uint8, shape, mmap_mode="r")


def _labels(folder: Path, manifest: Manifest, part: Part) -> Ids:
    labels = _load_array(folder / labels_file(part), np.int64, (manifest.counts[part],))
    if labels.min() < 0 or labels.max() >= len(manifest.classes):
        raise UserError(f"{folder / labels_file(part)} is damaged (a label is out of range): {prepare_again(folder)}")
    return labels


def _load_array(
    path: Path, dtype: type[np.generic], shape: tuple[int, ...], mmap_mode: Literal["r"] | None = None
) -> NDArray[Any]:
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"{array.dtype} {array.shape}, wanted {np.dtype(dtype)} {shape}")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): {prepare_again(path.parent)}") from None
    return array
