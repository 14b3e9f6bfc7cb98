"""What happens to a batch on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfw_dist.data.loading import MixUpCutMix, Normalize


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 3, 8, 8)


LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def mix(*, mixup: float = 0.0, cutmix: float = 0.0, label_smoothing: float = 0.0, seed: int = 0) -> MixUpCutMix:
    return MixUpCutMix(4, mixup=mixup, cutmix=cutmix, label_smoothing=label_smoothing, seed=seed)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_normalize_is_the_formula(memory_format: torch.memory_format) -> None:
    """Channels are mixed up, or checkpoints grow keys that old ones lack."""
    images = torch.randint(0, 256, (6, 3, 5, 4), dtype=torch.uint8).contiguous(memory_format=memory_format)
    normalize = Normalize(mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    out = normalize(images)
    mean, std = (np.reshape(value, (3, 1, 1)) for value in ([0.1, 0.5, 0.9], [0.2, 0.3, 0.4]))
    np.testing.assert_allclose(out.numpy(), (images.numpy() / 255 - mean) / std, atol=1e-5)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    assert not normalize.state_dict()


def test_all_off_changes_nothing(images: torch.Tensor) -> None:
    """Labels become probabilities, and the loss another sum, in runs that asked for nothing."""
    out, targets = mix()(images, LABELS, 3)
    assert out is images and targets is LABELS


def test_label_smoothing_is_that_of_the_loss(images: torch.Tensor) -> None:
    """Another smoothing than torch's."""
    _, targets = mix(label_smoothing=0.2)(images, LABELS, 0)
    logits = torch.randn(6, 4)
    expected = torch.nn.functional.cross_entropy(logits, LABELS, label_smoothing=0.2)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, targets), expected)


def test_mixup_mixes_images_and_labels_alike(images: torch.Tensor) -> None:
    """Labels mixed by another part than images, or an image with a partner whose label is not used."""
    out, targets = mix(mixup=1.0)(images, LABELS, 5)
    kept = targets[0, 0].item()  # partners 0 and 5 have labels 0 and 1
    assert 0 < kept < 1
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    torch.testing.assert_close(out, kept * images + (1 - kept) * images.flip(0))
    assert targets[0, 1].item() == pytest.approx(1 - kept)


def test_cutmix_pastes_a_box_and_its_area_of_the_label(images: torch.Tensor) -> None:
    """λ of the draw although the box was clipped; or the caller's images are overwritten."""
    before = images.clone()
    areas = set()
    for step in range(30):
        out, targets = mix(cutmix=1.0)(images, LABELS, step)
        pasted = (out != images).any(1)
        kept = targets[0, 0].item()
        assert torch.equal(images, before)
        assert pasted[0].float().mean().item() == pytest.approx(1 - kept)
        rows, columns = pasted[0].any(1).sum().item(), pasted[0].any(0).sum().item()
        assert rows * columns == pasted[0].sum().item()
        torch.testing.assert_close(torch.where(pasted[:, None], images.flip(0), images), out)
        areas.add(rows * columns)
    assert len(areas) > 5


def test_mixing_depends_on_seed_and_step_alone(images: torch.Tensor) -> None:
    """A resumed run mixes otherwise, because the draw depends on what was drawn before."""
    both = mix(mixup=0.5, cutmix=0.5)
    first = [both(images, LABELS, step)[1] for step in range(20)]
    again = [mix(mixup=0.5, cutmix=0.5)(images, LABELS, step)[1] for step in reversed(range(20))]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(mix(mixup=0.5, cutmix=0.5, seed=1)(images, LABELS, 0)[1], first[0])
    blended = [((out := both(images, LABELS, step)[0]) != images).all() and out is not None for step in range(20)]
    assert any(blended) and not all(blended)  # both kinds occur
