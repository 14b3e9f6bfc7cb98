"""Loaders: every backend's pixels, the ranks' shares, resuming, failures, threads. Ranks are simulated."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sfw_dist.data.prepare as preparing
from sfw_dist.config import DataConfig
from sfw_dist.data.datasets.array_sets import read_digits
from sfw_dist.data.loading import Loader, Split, dataset_info, open_loader
from sfw_dist.data.loading import build_loader as opening
from sfw_dist.data.loading import ffcv_probe as probe
from sfw_dist.data.loading.augment import Augmentation, SampleParams
from sfw_dist.data.loading.gpu import GPUBackend
from sfw_dist.data.loading.loader import ShardedLoader
from sfw_dist.data.prepare import prepare
from sfw_dist.data.sampler import EvaluationSampler, Ids, TrainingSampler, split_validation
from sfw_dist.errors import RankError, UserError

try:
    import sfw_dist.data.loading.ffcv  # noqa: F401
except (ImportError, OSError):
    ffcv_missing = True
else:
    ffcv_missing = False

BackendName = Literal["ffcv", "ram", "gpu", "folder"]
needs_ffcv = pytest.mark.skipif(ffcv_missing, reason="FFCV cannot be imported")
BACKENDS = [pytest.param("ffcv", marks=needs_ffcv), "ram"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    prepare("digits", root)
    return root


@pytest.fixture
def config(root: Path) -> DataConfig:
    """1,346 training samples, of them 136 for validation: 1,210, or 12 batches of 100; 451 test samples."""
    return DataConfig(root=str(root), backend="ram", batch_size=100, crop_padding=2, flip=True)


@pytest.fixture
def damaged_root(root: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(root / "digits", tmp_path / "digits")
    return tmp_path


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


AUGMENTATIONS = [
    {"crop_padding": 2, "flip": True, "cutout": 3},
    {"crop_padding": 0, "random_resized_crop": 0.2, "flip": True},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_backends_threads_and_ranks_yield_the_same_bits(
    config: DataConfig, backend: BackendName, augmentation: dict[str, Any]
) -> None:
    """A run depends on whether FFCV is installed, on the number of threads or on the number of ranks."""
    config = replace(config, **augmentation)
    expected = epoch_of(open_loader(config, "train", seed=1), 1)
    for threads, world_size in [(1, 1), (2, 2), (2, 4)]:
        shares = []
        for rank in range(world_size):
            options = replace(config, backend=backend, workers=threads)
            loader = open_loader(options, "train", seed=1, rank=rank, world_size=world_size)
            shares.append(epoch_of(loader, 1))
            loader.close()
        for number, (images, labels) in enumerate(expected):
            for rank, share in enumerate(shares):
                assert same([share[number]], [(images[rank::world_size], labels[rank::world_size])])


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_folder_and_gpu_yield_the_bits_of_the_array(tmp_path: Path, augmentation: dict[str, Any]) -> None:
    """The reference and the fast backends train different runs. The gpu backend runs on the CPU here."""
    draw = np.random.default_rng(0)
    for number in range(30):
        path = tmp_path / "raw" / "imagefolder" / ("train" if number < 20 else "val") / f"class{number % 2}"
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (14, 11, 3), dtype=np.uint8)).save(path / f"{number}.png")
    prepare("imagefolder", tmp_path, size=8)
    config = DataConfig(name="imagefolder", root=str(tmp_path), batch_size=6, validation_fraction=0, **augmentation)
    batches = [
        epoch_of(open_loader(replace(config, backend=backend), "train", seed=2), 3) for backend in ("folder", "ram")
    ]
    assert same(*batches) and len(batches[0]) == 3

    images, labels = torch.cat([b[0] for b in batches[1]]), torch.cat([b[1] for b in batches[1]])
    stored = np.load(tmp_path / "imagefolder" / "train_images.npy")
    order = TrainingSampler(np.arange(20), 6, 2, 0, 1).ids(3)
    params = Augmentation(flip=True, **{k: v for k, v in augmentation.items() if k != "flip"}).sample_params(
        order, (8, 8), seed=2, epoch=3
    )
    resident = GPUBackend(stored, np.load(tmp_path / "imagefolder" / "train_labels.npy"), torch.device("cpu"))
    assert same([resident.fetch(order, params)], [(images, labels)])


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
    assert same(epoch_of(resumed, 4), epoch_of(open_loader(replace(config, backend="ram"), "train", seed=1), 4))
    resumed.close()


def test_resume_at_the_end_of_an_epoch_yields_nothing_more(config: DataConfig) -> None:
    """A checkpoint after the last step of an epoch, and the resumed run trains that epoch again."""
    loader = open_loader(config, "train", seed=1)
    epoch_of(loader, 3)
    resumed = open_loader(config, "train", seed=1)
    resumed.load_state_dict(loader.state_dict())
    assert epoch_of(resumed, 3) == []
    assert len(epoch_of(resumed, 4)) == 12


class Recorder:
    """A backend that notes what is asked of it, and fails for the ids in ``bad``."""

    threaded = False

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.asked: list[int] = []
        self.bad = bad

    def fetch(self, ids: Ids, params: SampleParams) -> tuple[Tensor, Tensor]:
        self.asked += ids.tolist()
        if set(ids.tolist()) & set(self.bad):
            raise ValueError("broken\ndata stream")
        return torch.zeros(len(ids), 1, 1, 1, dtype=torch.uint8), torch.from_numpy(ids)

    def close(self) -> None: ...


def recorded(backend: Recorder, **options: Any) -> ShardedLoader:
    """Ten samples, in batches of two."""
    sampler = EvaluationSampler(np.arange(10), 2, 0, 1)
    params = partial(np.zeros, dtype=np.int64)
    return ShardedLoader(
        backend, sampler, sample_params=lambda ids, epoch: params((len(ids), 8)), name=lambda i: f"s{i}", **options
    )


def test_resume_fetches_only_what_is_left() -> None:
    """Resuming late in an epoch of ImageNet decodes all of it first."""
    backend = Recorder()
    loader = recorded(backend)
    loader.load_state_dict({"epoch": 0, "batch": 3})
    list(loader)
    assert backend.asked == [6, 7, 8, 9]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_sample_that_cannot_be_loaded_is_named(threads: int) -> None:
    """One bad image among a million ends the run, and the message does not say which; or the run hangs."""
    loader = recorded(Recorder(bad=(5, 7)), threads=threads)
    labels: list[int] = []
    with pytest.raises(RankError, match=r"s5 cannot be loaded \(ValueError: broken data stream\)") as error:
        within(60, lambda: labels.extend(int(label) for _, batch in loader for label in batch))
    assert labels == [0, 1, 2, 3] and "\n" not in str(error.value)


def test_a_stall_is_an_error_that_names_the_place() -> None:
    """A file system that hangs: the run waits for ever, on all nodes, at full price."""
    hang = threading.Event()

    class Stuck(Recorder):
        def fetch(self, ids: Ids, params: SampleParams) -> tuple[Tensor, Tensor]:
            if 4 in ids:
                hang.wait()
            return super().fetch(ids, params)

    loader = recorded(Stuck(), threads=2, stall_timeout=0.2, description="folder, 2 threads")
    try:
        with pytest.raises(RankError, match=r"no batch for 0.2 s .* from s4 on \(folder, 2 threads\).*stall_timeout"):
            within(60, lambda: list(loader))
    finally:
        hang.set()


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
        pytest.param("ram", "train_images.npy", truncate, id="truncated array"),
        pytest.param("ram", "train_images.npy", partial(overwrite, offset=0), id="array magic"),
        pytest.param("ram", "train_images.npy", partial(overwrite, offset=20), id="array header"),
        pytest.param("ram", "train_labels.npy", partial(overwrite, offset=200), id="labels"),
        pytest.param("ram", "manifest.json", truncate, id="manifest"),
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


# --- which backend ----------------------------------------------------------------------------------------------------


@needs_ffcv
def test_auto_takes_ffcv_and_says_why(config: DataConfig) -> None:
    """auto takes another backend although FFCV and its files are there, or does not say what it took."""
    loader = open_loader(replace(config, backend="auto", workers=1), "test", seed=0)
    assert loader.description == "ffcv, 1 thread(s) (auto: FFCV passed its probe)"


def test_where_ffcv_fails_auto_takes_ram_and_ffcv_is_an_error(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow run without a word why; or an ImportError for who asked for FFCV."""
    monkeypatch.setattr(opening, "ffcv_problem", lambda folder: "its probe failed: apt-get install it")
    loader = open_loader(replace(config, backend="auto", workers=1), "train", seed=0)
    assert loader.description == "ram, 1 thread(s) (auto: no FFCV: its probe failed: apt-get install it)"
    assert same(list(loader), list(open_loader(config, "train", seed=0)))
    with pytest.raises(UserError, match=r"data.backend ffcv: its probe failed.*write data.backend ram") as error:
        open_loader(replace(config, backend="ffcv"), "train", seed=0)
    one_line(error)


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (
            "import os; os._exit(139)",
            r"its probe failed \(exit status 139\): apt-get install.*pip install 'sfw-dist\[ffcv\]'",
        ),
        ("raise ImportError('libopencv_core.so.406')", r"its probe failed \(ImportError: libopencv_core.so.406\)"),
        ("import time; time.sleep(60)", r"its probe did not end within 1 s"),
        ("pass", None),
    ],
)
def test_ffcv_is_probed_in_a_process_of_its_own(
    script: str, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFCV hangs or crashes where it does not work, and takes the run with it; or every rank probes anew."""
    started: list[str] = []
    really = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        started.append(command[-1])
        return really([sys.executable, "-c", script], **options)

    monkeypatch.setattr(probe.subprocess, "run", run)
    monkeypatch.setattr(probe, "TIME_LIMIT", 1.0 if "sleep" in script else 60.0)
    problems = []
    for _ in range(2):
        probe.ffcv_problem.cache_clear()
        problems.append(probe.ffcv_problem(tmp_path))
    assert problems[0] == problems[1] and len(started) == 1
    assert problems[0] is None if told is None else re.match(told, str(problems[0]))
    assert started[0] == "from sfw_dist.data.loading.ffcv_probe import try_ffcv; try_ffcv()"
    monkeypatch.setattr(probe, "_versions", lambda: "another")
    probe.ffcv_problem.cache_clear()
    probe.ffcv_problem(tmp_path)
    assert len(started) == 2
    probe.ffcv_problem.cache_clear()


@needs_ffcv
def test_the_probe_itself_passes() -> None:
    """FFCV is never used, because its probe is wrong."""
    probe.try_ffcv()


@pytest.mark.parametrize(
    ("backend", "told"), [("gpu", "data.backend gpu needs a GPU"), ("folder", "digits was not prepared from image")]
)
def test_backends_that_cannot_be_are_refused(config: DataConfig, backend: BackendName, told: str) -> None:
    """A traceback, or silently another backend."""
    with pytest.raises(UserError, match=told) as error:
        open_loader(replace(config, backend=backend), "train", seed=0)
    one_line(error)


@needs_ffcv
def test_prepared_without_ffcv(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV is there, its files are not: auto does not train, or does not say what to do."""
    monkeypatch.setattr(preparing, "_beton_writer", lambda: None)
    prepare("digits", tmp_path)
    config = replace(config, root=str(tmp_path))
    description = open_loader(replace(config, backend="auto"), "test", seed=0).description
    assert description.startswith("ram") and "without it: run python -m sfw_dist.data prepare digits" in description
    with pytest.raises(UserError, match="prepared without it"):
        open_loader(replace(config, backend="ffcv"), "test", seed=0)


# --- what loaders leave behind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_hundred_epochs_left_early_or_not_leave_nothing_behind(config: DataConfig, backend: BackendName) -> None:
    """A thread or a batch's memory for every epoch: long runs end for want of either."""
    loader = open_loader(replace(config, backend=backend, workers=2), "train", seed=0)

    def epochs(first: int, last: int) -> None:
        for epoch in range(first, last):
            loader.set_epoch(epoch)
            for number, _ in enumerate(loader, start=1):
                if number == epoch % 14:
                    break

    def held() -> tuple[int, int]:
        gc.collect()
        tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
        return threading.active_count(), tensors

    epochs(0, 20)
    before = held()
    memory = resident_bytes()
    epochs(20, 220)
    assert held() == before
    assert resident_bytes() - memory < 16 << 20
    loader.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_in_the_middle_of_an_epoch(config: DataConfig, backend: BackendName) -> None:
    """close() leaves a thread behind, or the iterator waits for it for ever."""
    before = threading.active_count()
    loader = open_loader(replace(config, backend=backend, workers=2), "train", seed=0)
    batches = iter(loader)
    next(batches)
    loader.close()
    with pytest.raises((RuntimeError, UserError), match=r"closed|cannot be loaded"):
        within(60, lambda: list(batches))
    assert threading.active_count() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_loaders_keep_thread_counts_and_random_state(config: DataConfig, backend: BackendName) -> None:
    """FFCV sets torch's and numba's threads, so that training slows down, and params from numpy's global generator."""
    import numba

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        counts = torch.get_num_threads(), numba.get_num_threads()
        np.random.seed(0)
        loader = open_loader(replace(config, backend=backend, workers=1), "train", seed=0)
        list(loader)
        loader.close()
        assert (torch.get_num_threads(), numba.get_num_threads()) == counts
        drawn = np.random.randint(1 << 30)
        np.random.seed(0)
        assert drawn == np.random.randint(1 << 30)
    finally:
        torch.set_num_threads(threads)


@needs_ffcv
def test_importing_the_backends_keeps_thread_counts() -> None:
    """``import ffcv`` sets torch's threads to 1, for all of the training."""
    script = (
        "import torch; torch.set_num_threads(3); import sfw_dist.data, sfw_dist.data.loading.ffcv, numba; "
        "assert torch.get_num_threads() == 3, torch.get_num_threads(); "
        "assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=Path(__file__).parents[2])


# --- staging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_staging_reads_from_the_copy(
    config: DataConfig, backend: BackendName, damaged_root: Path, tmp_path: Path
) -> None:
    """The copy is not used, so that every epoch reads from the network; or it has other pixels."""
    config = replace(config, backend=backend, root=str(damaged_root), stage_dir=str(tmp_path / "disk"))
    expected = epoch_of(open_loader(replace(config, stage_dir=None), "train", seed=0))
    open_loader(config, "train", seed=0).close()
    (copy,) = (tmp_path / "disk").iterdir()
    data_file = "train.beton" if backend == "ffcv" else "train_images.npy"
    original = damaged_root / "digits" / data_file
    original.write_bytes(bytes(original.stat().st_size))  # what is read from here is zeros
    os.utime(copy / data_file, (0, 0))
    assert same(epoch_of(open_loader(config, "train", seed=0)), expected)
    assert (copy / data_file).stat().st_mtime == 0  # not copied again
    truncate(copy / data_file)
    with pytest.raises(UserError, match=f"{original} is damaged"):
        open_loader(config, "train", seed=0)


def test_staging_where_nothing_can_be_written_is_told(config: DataConfig) -> None:
    """A traceback when the node's disk is full or not there."""
    with pytest.raises(UserError, match=r"data.stage_dir /dev/null/disk: cannot copy.*free some space") as error:
        open_loader(replace(config, stage_dir="/dev/null/disk"), "train", seed=0)
    one_line(error)
