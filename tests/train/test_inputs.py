"""A run's input: what is checked, and how a batch is prepared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfw_dist.errors import UserError
from sfw_dist.train.inputs import BatchPreparation, check_input, open_loaders, splits
from tests.support.training import ONE_PROCESS, small_config


def test_world_larger_than_the_data(tmp_path: Path, digits: Path) -> None:
    """Fails when a rank without an image ends in a traceback, or in a hang of all others."""
    config = small_config(tmp_path / "runs", digits)
    config.data.batch_size = 4000
    with pytest.raises(UserError, match=r"4000.*ranks"):
        check_input(config, 0, 4000, resume=False)
    config.data.batch_size = 1000
    with pytest.raises(UserError, match=r"world size 1000 is larger than the 451 samples.*fewer ranks"):
        check_input(config, 0, 1000, resume=False)


def test_a_check_writes_nothing_to_the_runs_folder(tmp_path: Path, digits: Path) -> None:
    """Fails when a refused or merely checked run leaves a folder that the next one trips over."""
    run = check_input(small_config(tmp_path / "runs", digits), 0, 2, resume=False)
    assert not run.path.exists()


def test_a_batch_is_normalized_and_its_labels_smoothed(tmp_path: Path, digits: Path) -> None:
    """Fails when evaluation sees other images than training, or smoothing is lost on the way."""
    config = small_config(tmp_path / "runs", digits)
    config.data = replace(config.data, label_smoothing=0.1, crop_padding=0)
    assert splits(config) == ["train", "test", "validation"]
    loaders = open_loaders(config, ONE_PROCESS)
    batches = BatchPreparation(config, ONE_PROCESS.device)
    images, labels = next(iter(loaders["train"]))
    inputs, targets = batches.training(images, labels, 0)
    assert batches.classes == 10 and batches.image_shape == tuple(images.shape[1:])
    torch.testing.assert_close(inputs, batches.evaluation(images))
    assert abs(float(inputs.mean())) < 0.1 and images.dtype == torch.uint8
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(len(labels)), check_dtype=False)
    assert bool((targets.argmax(dim=1) == labels).all())
    for loader in loaders.values():
        loader.close()
