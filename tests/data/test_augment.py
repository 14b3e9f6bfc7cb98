"""Augmentation: the choice of parameters, the reference transform, and the compiled kernel against the reference."""

from __future__ import annotations

import importlib.util

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numba.core.caching import CacheImpl
from numpy.typing import NDArray
from torch import Tensor

from sfw_dist.data.loading import augment_numba
from sfw_dist.data.loading.augment import CUT_SIDE, HEIGHT, LEFT, TOP, WIDTH, Augmentation, SampleParams, transform
from sfw_dist.data.loading.augment_numba import transform_rows

EVERYTHING = [
    Augmentation(),
    Augmentation(crop_padding=2, flip=True),
    Augmentation(crop_padding=9, flip=True, cutout=3),
    Augmentation(flip=True, cutout=20, random_resized_crop=0.1),
    Augmentation(random_resized_crop=1.0),
]


def pixels(n: int, channels: int = 3, height: int = 5, width: int = 4) -> NDArray[np.uint8]:
    """``(n, H, W, C)``; none is zero, so that padding shows."""
    return np.random.default_rng(0).integers(1, 256, (n, height, width, channels), dtype=np.uint8)


def transformed(images: NDArray[np.uint8], params: SampleParams, rows: NDArray[np.int64] | None = None) -> Tensor:
    rows = np.arange(len(params)) if rows is None else rows
    return transform(torch.from_numpy(images), rows, params)


def chosen(
    augmentation: Augmentation, n: int, size: tuple[int, int] = (5, 4), seed: int = 0, epoch: int = 0
) -> SampleParams:
    return augmentation.sample_params(np.arange(n), size, seed=seed, epoch=epoch)


def test_nothing_is_the_identity() -> None:
    """Augmentation that was switched off still changes pixels."""
    images = pixels(8)
    out = transformed(images, chosen(Augmentation(), 8))
    np.testing.assert_array_equal(out.permute(0, 2, 3, 1), images)
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == torch.uint8


def test_every_shift_and_mirror_of_the_zero_padded_image_occurs() -> None:
    """An off-by-one never reaches a border, rows and columns are swapped, or something else than zeros moves in."""
    image = pixels(1)
    padded = F.pad(torch.from_numpy(image).permute(0, 3, 1, 2), (2,) * 4)
    variants = {}
    for top in range(5):
        for left in range(5):
            window = padded[:, :, top : top + 5, left : left + 4]
            variants[window.numpy().tobytes()] = (top, left, False)
            variants[window.flip(3).numpy().tobytes()] = (top, left, True)
    zeros = np.zeros(2000, np.int64)
    out = transformed(image, chosen(Augmentation(crop_padding=2, flip=True), 2000), zeros)
    found = [variants[sample.contiguous().numpy().tobytes()] for sample in out]  # a KeyError is no crop of the image
    assert set(found) == set(variants.values())
    assert abs(np.mean([mirrored for *_, mirrored in found]) - 0.5) < 0.05
    only_shifts = transformed(image, chosen(Augmentation(crop_padding=2), 500), zeros[:500])
    assert not any(variants[sample.contiguous().numpy().tobytes()][2] for sample in only_shifts)


def test_crops_and_flips_never_change() -> None:
    """Other params in a new version: a resumed run sees other pixels."""
    params = chosen(Augmentation(crop_padding=4, flip=True), 3, (8, 8), seed=1, epoch=2)
    assert params[:, [TOP, LEFT, 4]].tolist() == [[0, 3, 0], [-4, -1, 0], [-2, -4, 1]]


@pytest.mark.parametrize("augmentation", EVERYTHING[1:4])
def test_parameters_depend_on_seed_epoch_and_id_alone(augmentation: Augmentation) -> None:
    """SampleParams that depend on the place in the batch: one rank and N ranks, or a resumed run, see other pixels."""
    ids = np.arange(40) * 7
    whole = augmentation.sample_params(ids, (8, 8), seed=3, epoch=4)
    np.testing.assert_array_equal(augmentation.sample_params(ids[1::3], (8, 8), seed=3, epoch=4), whole[1::3])
    assert not np.array_equal(augmentation.sample_params(ids, (8, 8), seed=3, epoch=5), whole)
    assert not np.array_equal(augmentation.sample_params(ids, (8, 8), seed=4, epoch=4), whole)


def test_random_boxes_lie_inside_with_the_area_and_shape_asked_for() -> None:
    """Boxes that stick out (black margins), that are all alike, or that are smaller than asked for."""
    params = chosen(Augmentation(random_resized_crop=0.25), 3000, (60, 80))
    assert (params[:, [TOP, LEFT]] >= 0).all()
    assert (params[:, TOP] + params[:, HEIGHT] <= 60).all() and (params[:, LEFT] + params[:, WIDTH] <= 80).all()
    area = params[:, HEIGHT] * params[:, WIDTH] / 4800
    assert 0.24 < area.min() < 0.3 and area.max() > 0.9
    ratio = params[:, WIDTH] / params[:, HEIGHT]
    assert 0.7 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.4
    assert (params[:, TOP] == 0).any() and (params[:, TOP] + params[:, HEIGHT] == 60).any()


def test_resizing_is_bilinear() -> None:
    """Half-pixel shifts, swapped axes or a wrong weight. Two grey levels are left to weights in 1/256."""
    images = pixels(50, height=12, width=16)
    augmentation = Augmentation(random_resized_crop=0.1)
    params = chosen(augmentation, 50, (12, 16))
    out = transformed(images, params)
    for i, (top, left, height, width) in enumerate(params[:, :4].tolist()):
        box = torch.from_numpy(images[i, top : top + height, left : left + width]).permute(2, 0, 1).float()
        expected = F.interpolate(box[None], (12, 16), mode="bilinear", align_corners=False)[0]
        assert (out[i].float() - expected).abs().max() < 2


def test_cutout_is_a_square_that_may_be_clipped() -> None:
    """A square of another size, never at the border, or always at the same place."""
    out = transformed(
        pixels(1, height=9, width=9), chosen(Augmentation(cutout=4), 500, (9, 9)), np.zeros(500, np.int64)
    )
    holes = (out == 0).all(1)
    assert torch.equal((out == 0).any(1), holes)  # in all channels
    heights, widths = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(heights * widths, holes.sum((1, 2)))
    assert heights.max() == 4 and heights.min() == 2 and holes.any(0).all()


@pytest.mark.parametrize("augmentation", EVERYTHING)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 28, 28), (3, 7, 10), (4, 9, 5), (3, 1, 1)])
def test_the_kernel_is_the_reference(augmentation: Augmentation, shape: tuple[int, int, int]) -> None:
    """The compiled kernel differs in some pixel: a run depends on the backend."""
    channels, height, width = shape
    images, rows = pixels(20, channels, height, width), np.random.default_rng(1).integers(0, 20, 60)
    params = chosen(augmentation, 60, (height, width), seed=5, epoch=1)
    out = np.full((60, height, width, channels), 77, np.uint8)
    transform_rows(images, rows, params, out)
    np.testing.assert_array_equal(out, transformed(images, params, rows).permute(0, 2, 3, 1))


@given(
    box=st.tuples(st.integers(-7, 7), st.integers(-9, 9)),
    mirror=st.integers(0, 1),
    cut=st.tuples(st.integers(-6, 9), st.integers(-6, 9), st.integers(0, 12)),
)
def test_the_kernel_is_the_reference_wherever_the_box_lies(
    box: tuple[int, int], mirror: int, cut: tuple[int, int, int]
) -> None:
    """A box or square that is partly or wholly outside: the kernel reads or writes beyond the image."""
    images = pixels(1, 3, 5, 7)
    params = np.array([[*box, 5, 7, mirror, *cut]])
    out = np.full((3, 5, 7, 3), 77, np.uint8)
    transform_rows(images, np.array([0]), params, out[1:2])
    np.testing.assert_array_equal(out[1:2], transformed(images, params).permute(0, 2, 3, 1))
    assert (out[[0, 2]] == 77).all()
    assert params[0, CUT_SIDE] == cut[2]


def test_without_a_folder_for_machine_code_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when even --help ends in a traceback of numba where package and home are read-only."""
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator"):
        numba.njit(cache=True)(lambda: 0)
    spec = importlib.util.spec_from_file_location("in_a_container", augment_numba.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.transform_rows.py_func.__name__ == "transform_rows"


def test_a_panorama_is_never_squeezed() -> None:
    """Fails when a box that nowhere fits becomes the whole of a long image, in the shape of a square one."""
    sizes = np.full(50, 10), np.where(np.arange(50) % 2, 100, 12)
    params = Augmentation(random_resized_crop=1.0).sample_params(np.arange(50), sizes, seed=0, epoch=0)
    assert {(int(h), int(w)) for h, w in params[1::2, [HEIGHT, WIDTH]]} == {(10, 13)}
    assert (params[:, LEFT] + params[:, WIDTH] <= sizes[1]).all() and params[1::2, LEFT].max() > 50
