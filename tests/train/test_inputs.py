"""A run's input: what is checked, and how a batch is prepared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sfw_dist.data import write
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


def test_what_a_function_returns_is_prepared_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when ``data.name: package.module:function`` must be prepared by hand, or goes on after an edit."""
    code = "import numpy as np\npart = (np.zeros((30, 8, 8), np.uint8), list('abc') * 10)\n"
    code += "def letters():\n    return {'train': part, 'test': part}\n"
    (tmp_path / "own_letters.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = small_config(tmp_path / "runs", tmp_path / "data")
    config.data = replace(config.data, name="own_letters:letters", batch_size=10)
    run = check_input(config, 0, 1, resume=False)
    data = BatchPreparation(config, ONE_PROCESS.device).data
    assert data.classes == ("a", "b", "c") and data.counts == {"train": 30, "test": 30}
    run.create(config, data)
    check_input(config, 0, 1, resume=True)
    (tmp_path / "own_letters.py").write_text(code.replace("zeros", "ones"))
    with pytest.raises(UserError, match=r"own_letters\.py \(changed\).*--again"):
        check_input(config, 0, 1, resume=True)


def test_a_run_is_not_resumed_with_other_data(tmp_path: Path) -> None:
    """Fails when a run goes on with images that were added since it began."""
    images, labels = np.zeros((30, 8, 8), np.uint8), list("abc") * 10
    write(tmp_path / "data", "letters", (images, labels), (images, labels))
    config = small_config(tmp_path / "runs", tmp_path / "data")
    config.data = replace(config.data, name="letters", batch_size=10)
    run = check_input(config, 0, 1, resume=False)
    run.create(config, BatchPreparation(config, ONE_PROCESS.device).data)
    images[0, 0, 0] = 1
    write(tmp_path / "data", "letters", (images, labels), (images, labels), again=True)
    with pytest.raises(UserError, match=r"trained on other data \(mean .*, was 0\).*--data\.root"):
        check_input(config, 0, 1, resume=True)


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
