"""Loaders: who sees which sample when, with which pixels; resuming; failures; threads. Ranks are simulated."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

import sfw_dist.data.prepare as preparing
from sfw_dist.config import DataConfig
from sfw_dist.data import Loader, Normalize, Split, dataset_info, open_loader
from sfw_dist.data.augment import crop_flip
from sfw_dist.data.loader import ShardedLoader
from sfw_dist.data.order import (
    EvaluationOrder,
    Ids,
    TrainingOrder,
    counter_hash,
    epoch_order,
    split_validation,
)
from sfw_dist.data.prepare import prepare
from sfw_dist.data.readers import read_digits
from sfw_dist.errors import UserError

try:
    import sfw_dist.data.ffcv  # noqa: F401
except (ImportError, OSError):
    ffcv_missing = True
else:
    ffcv_missing = False

BackendName = Literal["ffcv", "torch"]
needs_ffcv = pytest.mark.skipif(ffcv_missing, reason="FFCV cannot be imported")
BACKENDS = [pytest.param("ffcv", marks=needs_ffcv), "torch"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    prepare("digits", root)
    return root


@pytest.fixture
def config(root: Path) -> DataConfig:
    """1,346 training samples, of them 136 for validation: 1,210, or 12 batches of 100; 451 test samples."""
    return DataConfig(root=str(root), backend="torch", batch_size=100, crop_padding=2, flip=True)


@pytest.fixture
def damaged_root(root: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(root / "digits", tmp_path / "digits")
    return tmp_path


@pytest.fixture(scope="module")
def ffcv_train(root: Path) -> Iterator[Loader]:
    """One FFCV loader for many tests: each compiles a pipeline. Tests set their own epoch."""
    loader = open_loader(DataConfig(root=str(root), backend="ffcv", batch_size=100), "train", seed=3)
    yield loader
    loader.close()


def epoch_of(loader: Loader, epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    loader.set_epoch(epoch)
    return list(loader)


def same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def within(seconds: float, act: Callable[[], object]) -> None:
    """Run ``act`` in a thread and fail, instead of hanging the suite, when it does not return."""
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still waiting after {seconds} s"
    if outcome:
        raise outcome[0]


# --- hash, order, shares ----------------------------------------------------------------------------------------------


def test_hash_is_splitmix64() -> None:
    """A wrong constant weakens the generator unnoticed: these are splitmix64's first outputs for seeds 0 and 1."""
    assert counter_hash(0).tolist() == [0xE220A8397B1DCDAF]
    assert counter_hash(1).tolist() == [0x910A2DEC89025CC1]


def test_orders_never_change() -> None:
    """Another order (a new numpy, say) makes a resumed run see some samples twice and others never."""
    assert epoch_order(10, seed=0, epoch=0).tolist() == [0, 9, 1, 6, 3, 5, 4, 2, 8, 7]
    assert epoch_order(10, seed=2, epoch=7).tolist() == [7, 1, 5, 6, 4, 8, 3, 2, 0, 9]


def test_order_hashes_seed_and_epoch_apart() -> None:
    """seed + epoch as the seed: run 1 repeats run 0's batches, one epoch late."""
    orders = [tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_order_is_uniform() -> None:
    """Some samples come early in every epoch."""
    positions = np.array([np.argsort(epoch_order(20, seed=0, epoch=epoch)) for epoch in range(2000)])
    np.testing.assert_allclose(positions.mean(axis=0), 9.5, atol=0.6)  # 4.6 standard deviations


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_sample_once_per_epoch(world_size: int) -> None:
    """Ranks overlap or skip: all but the last, partial global batch are visited exactly once."""
    members = np.arange(100, 162)
    shares = [TrainingOrder(members, 12, 0, rank, world_size) for rank in range(world_size)]
    ids = np.concatenate([share.ids(epoch=5) for share in shares])
    assert len(ids) == len(set(ids.tolist())) == 60 and set(ids.tolist()) <= set(members.tolist())
    assert all(len(share.ids(5)) == share.samples == 60 // world_size for share in shares)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_slice_the_batches_of_one_rank(world_size: int) -> None:
    """N ranks see other global batches than one rank: their gradients, and so the runs, differ."""
    one = TrainingOrder(np.arange(50), 12, 0, 0, 1).ids(3).reshape(4, 12)
    for rank in range(world_size):
        share = TrainingOrder(np.arange(50), 12, 0, rank, world_size)
        np.testing.assert_array_equal(share.ids(3).reshape(4, share.batch_size), one[:, rank::world_size])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_evaluation_shares_are_exact(world_size: int) -> None:
    """A padded sampler counts some samples twice: the accuracy depends on the world size."""
    shares = [EvaluationOrder(np.arange(13), 4, rank, world_size) for rank in range(world_size)]
    ids = np.concatenate([share.ids(0) for share in shares])
    assert sorted(ids.tolist()) == list(range(13))
    assert [share.samples for share in shares] == [len(share.ids(0)) for share in shares]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: TrainingOrder(np.arange(50), 10, 0, 0, 4), "data.batch_size 10.*world size 4.*write 8"),
        (lambda: TrainingOrder(np.arange(50), 3, 0, 0, 4), "data.batch_size 3.*world size 4.*write 4"),
        (lambda: TrainingOrder(np.arange(50), 64, 0, 0, 64), "data.batch_size 64.*world size 64.*50 training samples"),
        (lambda: EvaluationOrder(np.arange(3), 4, 0, 4), "world size 4.*3 samples"),
    ],
)
def test_impossible_shares_are_refused(make: Callable[[], object], told: str) -> None:
    """Zero batches an epoch: training that does nothing, or ranks that wait for one another for ever."""
    with pytest.raises(UserError, match=told) as error:
        make()
    one_line(error)


def test_validation_split_is_stratified_and_disjoint() -> None:
    """Training on validation samples, or a class that is missing from validation."""
    labels = np.repeat(np.arange(4), [10, 20, 40, 30])
    train, validation = split_validation(labels, 0.2, seed=1)
    assert sorted(np.concatenate([train, validation]).tolist()) == list(range(100))
    assert np.bincount(labels[validation]).tolist() == [2, 4, 8, 6]
    assert not np.array_equal(validation, split_validation(labels, 0.2, seed=2)[1])
    assert len(split_validation(labels, 0.0, seed=1)[1]) == 0


# --- augmentation and normalisation -----------------------------------------------------------------------------------


def augmentable(n: int, channels: int = 3, height: int = 5, width: int = 4) -> Tensor:
    """No pixel is zero, so that padding shows."""
    pixels = np.random.default_rng(0).integers(1, 256, (n, channels, height, width), dtype=np.uint8)
    return torch.from_numpy(pixels).contiguous(memory_format=torch.channels_last)


def test_no_padding_and_no_flip_is_the_identity() -> None:
    """Augmentation that was switched off still changes pixels."""
    images = augmentable(8)
    assert torch.equal(crop_flip(images, np.arange(8), seed=0, epoch=1, padding=0, flip=False), images)


def test_every_shift_and_mirror_of_the_zero_padded_image_occurs() -> None:
    """An off-by-one never reaches a border, rows and columns are swapped, or something else than zeros moves in."""
    image, padding = augmentable(1), 2
    padded = torch.nn.functional.pad(image, (padding,) * 4)
    variants = {}
    for top in range(5):
        for left in range(5):
            window = padded[:, :, top : top + 5, left : left + 4]
            variants[window.numpy().tobytes()] = (top, left, False)
            variants[window.flip(3).numpy().tobytes()] = (top, left, True)
    out = crop_flip(image.expand(2000, -1, -1, -1), np.arange(2000), seed=0, epoch=0, padding=padding, flip=True)
    drawn = [variants[sample.numpy().tobytes()] for sample in out]  # a KeyError is no crop of the image
    assert set(drawn) == set(variants.values())
    assert abs(np.mean([mirrored for *_, mirrored in drawn]) - 0.5) < 0.05
    only_shifts = crop_flip(image.expand(500, -1, -1, -1), np.arange(500), seed=0, epoch=0, padding=2, flip=False)
    assert not any(variants[sample.numpy().tobytes()][2] for sample in only_shifts)


def test_augmentation_depends_on_seed_epoch_and_id_alone() -> None:
    """Draws that depend on the place in the batch: one rank and N ranks, or a resumed run, see other pixels."""
    images, ids = augmentable(40), np.arange(40) * 7
    augment = partial(crop_flip, seed=3, padding=2, flip=True)
    whole = augment(images, ids, epoch=4)
    assert torch.equal(augment(images[1::3], ids[1::3], epoch=4), whole[1::3])
    assert not torch.equal(augment(images, ids, epoch=5), whole)
    assert not torch.equal(crop_flip(images, ids, seed=4, epoch=4, padding=2, flip=True), whole)
    assert whole.is_contiguous(memory_format=torch.channels_last) and whole.dtype == torch.uint8


def test_normalize_is_the_formula() -> None:
    """Channels are mixed up, the memory format is lost, or checkpoints grow keys that old ones lack."""
    images = augmentable(6)
    normalize = Normalize(mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    out = normalize(images)
    expected = (images.numpy() / 255 - np.array([0.1, 0.5, 0.9]).reshape(3, 1, 1)) / np.reshape(
        [0.2, 0.3, 0.4], (3, 1, 1)
    )
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    assert not normalize.state_dict()


# --- loaders on digits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_are_the_stored_samples(config: DataConfig, backend: BackendName) -> None:
    """Wrong layout or order of a batch; labels of another sample; tensors that the next batch overwrites."""
    config = replace(config, backend=backend, eval_batch_size=50)
    loader = open_loader(config, "test", seed=0)
    batches = list(loader)  # kept, and more than FFCV has buffers, so that a reused one would show
    assert [len(labels) for _, labels in batches] == [50] * 9 + [1] and len(loader) == 10 and loader.samples == 451
    for images, labels in batches:
        assert images.dtype == torch.uint8 and images.shape == (len(labels), 1, 8, 8)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64 and labels.dim() == 1
    raw = read_digits(Path())
    np.testing.assert_array_equal(torch.cat([images for images, _ in batches])[:, 0], raw.test_images[..., 0])
    np.testing.assert_array_equal(torch.cat([labels for _, labels in batches]), raw.test_labels)
    assert same(list(loader), batches)  # evaluated again without set_epoch
    loader.close()


@needs_ffcv
def test_backends_yield_the_same_bits(config: DataConfig) -> None:
    """A run depends on whether FFCV is installed."""
    fast, plain = (
        open_loader(replace(config, backend=backend), "train", seed=1, rank=1, world_size=2)
        for backend in ("ffcv", "torch")
    )
    for epoch in (0, 1):
        assert same(epoch_of(fast, epoch), epoch_of(plain, epoch))
    fast.close()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_pixels_of_one_rank(config: DataConfig, world_size: int) -> None:
    """The augmented pixels or the batches depend on the world size: scaling out changes the run."""
    one = epoch_of(open_loader(config, "train", seed=1), epoch=2)
    for rank in range(world_size):
        share = epoch_of(open_loader(config, "train", seed=1, rank=rank, world_size=world_size), epoch=2)
        assert same(share, [(images[rank::world_size], labels[rank::world_size]) for images, labels in one])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_every_test_sample_exactly_once(config: DataConfig, world_size: int) -> None:
    """Accuracy over 451 samples becomes accuracy over 452 or 450."""
    loaders = [open_loader(config, "test", seed=0, rank=rank, world_size=world_size) for rank in range(world_size)]
    pixels = np.concatenate([images.numpy() for loader in loaders for images, _ in loader]).reshape(-1, 64)
    expected = read_digits(Path()).test_images.reshape(-1, 64)
    assert len(pixels) == sum(loader.samples for loader in loaders) == 451
    np.testing.assert_array_equal(pixels[np.lexsort(pixels.T)], expected[np.lexsort(expected.T)])


def test_validation_is_held_out_and_not_augmented(config: DataConfig) -> None:
    """Validation on training samples, or on cropped ones, or on others at another world size."""
    config = replace(config, batch_size=1)
    raw = read_digits(Path())
    train, validation = split_validation(raw.train_labels, config.validation_fraction, seed=5)
    loader = open_loader(config, "validation", seed=5)
    assert loader.samples == len(validation) == 136
    np.testing.assert_array_equal(
        torch.cat([images for images, _ in loader])[:, 0], raw.train_images[validation][..., 0]
    )
    assert open_loader(config, "train", seed=5).samples == len(train) == 1210
    share = open_loader(config, "validation", seed=5, rank=1, world_size=2)
    np.testing.assert_array_equal(torch.cat([labels for _, labels in share]), raw.train_labels[validation[1::2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_in_the_middle_is_bitwise(config: DataConfig, backend: BackendName) -> None:
    """After a preemption samples come twice or never, or with other pixels."""
    config = replace(config, backend=backend)
    loader = open_loader(config, "train", seed=1)
    whole = epoch_of(loader, 3)
    loader.set_epoch(3)
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    state = loader.state_dict()
    assert state == {"epoch": 3, "batch": 5}
    loader.close()

    resumed = open_loader(config, "train", seed=1)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.set_epoch(3)  # as a training loop does before each epoch
    assert same(list(resumed), whole[5:])
    assert same(list(resumed), whole)  # the place holds for one iteration
    assert same(epoch_of(resumed, 4), epoch_of(open_loader(replace(config, backend="torch"), "train", seed=1), 4))
    resumed.close()


def test_resume_at_the_end_of_an_epoch_yields_nothing_more(config: DataConfig) -> None:
    """A checkpoint after the last step of an epoch, and the resumed run trains that epoch again."""
    loader = open_loader(config, "train", seed=1)
    epoch_of(loader, 3)
    resumed = open_loader(config, "train", seed=1)
    resumed.load_state_dict(loader.state_dict())
    assert epoch_of(resumed, 3) == []
    assert len(epoch_of(resumed, 4)) == 12


def test_resume_fetches_only_what_is_left() -> None:
    """Resuming late in an epoch of ImageNet decodes all of it first."""

    class Recorder:
        def __init__(self) -> None:
            self.asked: list[int] = []

        def batches(self, ids: Ids) -> Generator[tuple[Tensor, Tensor], None, None]:
            self.asked = ids.tolist()
            yield from ()

        def close(self) -> None: ...

    backend, order = Recorder(), EvaluationOrder(np.arange(10), 2, 0, 1)
    loader = ShardedLoader(backend, order)
    loader.load_state_dict({"epoch": 0, "batch": 3})
    list(loader)
    assert backend.asked == [6, 7, 8, 9]


@pytest.mark.parametrize("batch", [13, -1])
def test_a_state_of_another_run_is_refused(config: DataConfig, batch: int) -> None:
    """A state beyond the epoch resumes as an epoch without batches."""
    with pytest.raises(UserError, match="12 batches") as error:
        open_loader(config, "train", seed=1).load_state_dict({"epoch": 0, "batch": batch})
    one_line(error)


def test_dataset_info_counts_the_splits(config: DataConfig) -> None:
    """Steps per epoch are planned for samples that are held out."""
    info = dataset_info(config)
    assert info.counts == {"train": 1210, "validation": 136, "test": 451}
    assert info.classes == tuple("0123456789") and info.image_shape == (1, 8, 8)
    pixels = read_digits(Path()).train_images / 255
    np.testing.assert_allclose([*info.mean, *info.std], [pixels.mean(), pixels.std()])


# --- what users get wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "changes", "world_size", "told"),
    [
        ("train", {"name": "digit"}, 1, "'digit'.*digits, fashion_mnist"),
        ("train", {"name": "fashion_mnist"}, 1, "not prepared.*sfw_dist.data prepare fashion_mnist --root"),
        ("train", {"root": "/nowhere"}, 1, "not prepared in /nowhere/digits.*prepare digits --root /nowhere"),
        ("train", {"batch_size": 2000}, 2000, "world size 2000.*1210 training samples"),
        ("train", {}, 3, "world size 3.*write 99"),
        ("test", {}, 452, "world size 452.*451 samples"),
        ("validation", {"validation_fraction": 0.0}, 1, "validation_fraction 0.0.*write 0.1"),
    ],
)
def test_user_errors_are_one_line(
    config: DataConfig, split: Split, changes: dict[str, Any], world_size: int, told: str
) -> None:
    """A traceback from deep within, or a run that waits for a rank without data."""
    with pytest.raises(UserError, match=told) as error:
        open_loader(replace(config, **changes), split, seed=0, world_size=world_size)
    one_line(error)


def overwrite(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 8)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("backend", "file", "damage"),
    [
        pytest.param("ffcv", "train.beton", truncate, marks=needs_ffcv, id="truncated beton"),
        pytest.param("ffcv", "train.beton", partial(overwrite, offset=0), marks=needs_ffcv, id="beton version"),
        pytest.param("ffcv", "train.beton", partial(overwrite, offset=8), marks=needs_ffcv, id="beton count"),
        pytest.param("ffcv", "train.beton", partial(overwrite, offset=3000), marks=needs_ffcv, id="beton address"),
        pytest.param("ffcv", "train.beton", partial(overwrite, offset=-24), marks=needs_ffcv, id="beton table"),
        pytest.param("ffcv", "train.beton", Path.unlink, marks=needs_ffcv, id="no beton"),
        pytest.param("torch", "train_images.npy", truncate, id="truncated array"),
        pytest.param("torch", "train_images.npy", partial(overwrite, offset=0), id="array magic"),
        pytest.param("torch", "train_images.npy", partial(overwrite, offset=20), id="array header"),
        pytest.param("torch", "train_labels.npy", partial(overwrite, offset=200), id="labels"),
        pytest.param("torch", "manifest.json", truncate, id="manifest"),
    ],
)
def test_a_damaged_file_is_named_with_the_remedy(
    damaged_root: Path, backend: BackendName, file: str, damage: Callable[[Path], object]
) -> None:
    """FFCV crashes on a wrong address, hangs, or speaks of negative dimensions."""
    path = damaged_root / "digits" / file
    if isinstance(damage, partial) and damage.keywords["offset"] < 0:
        damage = partial(overwrite, offset=path.stat().st_size + damage.keywords["offset"])
    damage(path)
    with pytest.raises(UserError) as error:
        open_loader(DataConfig(root=str(damaged_root), backend=backend), "train", seed=0)
    message = one_line(error)
    assert str(path) in message and f"sfw_dist.data prepare digits --root {damaged_root}" in message


def test_without_ffcv_auto_warns_and_ffcv_is_an_error(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow run without a word why; or an ImportError for who asked for FFCV."""
    monkeypatch.setitem(sys.modules, "sfw_dist.data.ffcv", None)
    with pytest.warns(UserWarning, match="auto takes torch: FFCV cannot be imported.*apt-get install"):
        loader = open_loader(replace(config, backend="auto"), "train", seed=0)
    assert same(list(loader), list(open_loader(config, "train", seed=0)))
    with pytest.raises(UserError, match=r"FFCV cannot be imported.*pip install ffcv") as error:
        open_loader(replace(config, backend="ffcv"), "train", seed=0)
    one_line(error)


@needs_ffcv
def test_prepared_without_ffcv(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV is there, its files are not: auto must still train, and say what to do."""
    monkeypatch.setattr(preparing, "_beton_writer", lambda: None)
    prepare("digits", tmp_path)
    config = replace(config, root=str(tmp_path))
    with pytest.warns(UserWarning, match="prepared without FFCV: run python -m sfw_dist.data prepare digits"):
        open_loader(replace(config, backend="auto"), "test", seed=0)
    with pytest.raises(UserError, match="prepared without FFCV"):
        open_loader(replace(config, backend="ffcv"), "test", seed=0)


@needs_ffcv
def test_auto_takes_ffcv_silently(config: DataConfig) -> None:
    """auto warns, or takes the slow backend, although FFCV and its files are there."""
    from sfw_dist.data.ffcv import FFCVBackend

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = open_loader(replace(config, backend="auto"), "test", seed=0)
    assert isinstance(loader, ShardedLoader) and isinstance(loader._backend, FFCVBackend)
    loader.close()


# --- FFCV's threads ---------------------------------------------------------------------------------------------------


@needs_ffcv
def test_an_error_in_the_pipeline_thread_reaches_the_caller(
    ffcv_train: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFCV's thread dies and the training loop waits for its next batch for ever."""
    from sfw_dist.data.ffcv import _Epoch

    def fail(self: object, number: int, *args: object) -> object:
        if number == 2:
            raise RuntimeError("decoder failed")
        return decode(self, number, *args)

    decode = _Epoch.run_pipeline
    monkeypatch.setattr(_Epoch, "run_pipeline", fail)
    with pytest.raises(RuntimeError, match="decoder failed"):
        within(60, lambda: epoch_of(ffcv_train))
    monkeypatch.undo()
    assert len(epoch_of(ffcv_train)) == 12


@needs_ffcv
@pytest.mark.parametrize("taken", [1, 8, 11])
def test_leaving_epochs_early_leaks_no_thread(ffcv_train: Loader, taken: int) -> None:
    """A thread for each epoch left; FFCV's own cannot even end when all that remains fits into its queue."""
    epoch_of(ffcv_train)
    before = threading.active_count()

    def leave() -> None:
        for epoch in range(4):
            ffcv_train.set_epoch(epoch)
            for number, _ in enumerate(ffcv_train, start=1):
                if number == taken:
                    break

    within(60, leave)
    assert threading.active_count() == before


@needs_ffcv
def test_close_in_the_middle_of_an_epoch(config: DataConfig) -> None:
    """close() leaves a thread behind, or the iterator waits for it for ever."""
    before = threading.active_count()
    loader = open_loader(replace(config, backend="ffcv"), "train", seed=0)
    batches = iter(loader)
    next(batches)
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        within(60, lambda: next(batches))


@needs_ffcv
def test_loaders_keep_thread_counts_and_random_state(config: DataConfig) -> None:
    """FFCV sets torch's and numba's threads, so that training slows down, and draws from numpy's global generator."""
    import numba

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        counts = torch.get_num_threads(), numba.get_num_threads()
        np.random.seed(0)
        loader = open_loader(replace(config, backend="ffcv", workers=1), "test", seed=0)
        list(loader)
        loader.close()
        assert (torch.get_num_threads(), numba.get_num_threads()) == counts
        drawn = np.random.randint(1 << 30)
        np.random.seed(0)
        assert drawn == np.random.randint(1 << 30)
    finally:
        torch.set_num_threads(threads)


@needs_ffcv
def test_importing_the_backend_keeps_thread_counts() -> None:
    """``import ffcv`` sets torch's threads to 1, for all of the training."""
    script = (
        "import torch; torch.set_num_threads(3); import sfw_dist.data.ffcv, numba; "
        "assert torch.get_num_threads() == 3, torch.get_num_threads(); "
        "assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=Path(__file__).parents[1])


@needs_ffcv
def test_worker_threads_are_shared_by_local_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks on a node each start as many threads as it has cores; more than the affinity mask fails."""
    import numba

    from sfw_dist.data.ffcv import _worker_threads

    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [_worker_threads(requested) for requested in (0, 3, 100)] == [8, 3, 8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert _worker_threads(0) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert _worker_threads(0) == 1
