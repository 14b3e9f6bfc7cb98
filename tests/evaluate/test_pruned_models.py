"""The pruned networks of a run: what is measured is what pruning in place leaves."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfw_dist.config import ModelConfig, load_config
from sfw_dist.data.loading import Normalize, dataset_info, open_loader
from sfw_dist.evaluate.__main__ import main
from sfw_dist.evaluate.pruned_models import AS_TRAINED, PrunedModels
from sfw_dist.evaluate.sweep import sweep_run
from sfw_dist.pruning import prune, recalibrate
from sfw_dist.train.metrics import measure
from sfw_dist.train.run_folder import RunFolder
from sfw_dist.train.trainer import train
from tests.evaluate.conftest import trained_model
from tests.support import networks
from tests.support.training import ONE_PROCESS, small_config


def test_one_pass_measures_what_pruning_in_place_does(run: RunFolder) -> None:
    """Weights are masked again for each batch; a mask or statistics that leaked would show at another sparsity."""
    config = load_config(run.config)
    info = dataset_info(config.data)
    normalize = Normalize(info.mean, info.std)
    models = PrunedModels(run, ONE_PROCESS)
    before = copy.deepcopy(models.model.state_dict())
    sparsities = [0.9, 0.0, 0.5]
    prunings = [models.at(sparsity) for sparsity in sparsities]
    statistics = models.recalibrated(prunings)
    together = models.measure("test", prunings, [[AS_TRAINED, found] for found in statistics])
    models.close()
    assert all(torch.equal(before[name], tensor) for name, tensor in models.model.state_dict().items())

    loader = open_loader(config.data, "test", seed=0)
    plain = replace(config.data, crop_padding=0)
    training = [normalize(images).contiguous() for images, _ in open_loader(plain, "train", seed=0)]
    for sparsity, measured in zip(sparsities, together, strict=True):
        alone = trained_model(run, config)
        prune(alone, sparsity)
        for metrics in measured:
            with torch.no_grad():
                expected = measure(lambda x, alone=alone: alone(normalize(x).contiguous()), loader, ONE_PROCESS)  # type: ignore[misc]
            assert (metrics.top1, metrics.top5, metrics.samples) == (expected.top1, expected.top5, expected.samples)
            assert metrics.loss == pytest.approx(expected.loss, rel=1e-5)
            recalibrate(alone, training)  # for the second of the two


def test_renamed_classes_are_not_measured(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when a network is measured on data whose classes have other numbers: 0 % accuracy, and exit status 0."""
    config = load_config(run.config)
    folder = shutil.copytree(Path(config.data.root) / "digits", tmp_path / "digits")
    assert main([str(run.path), "--sparsities", "0", "--data-root", str(tmp_path)]) == 0, "a copy is no change"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["classes"][3:5] = ["four", "three"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main([str(run.path), "--sparsities", "0", "--data-root", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert "class 3 is 'four', was '3'" in output.err and output.err.count("\n") == 1 and not output.out


def test_weights_of_another_model(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback of many lines with tensors' names."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_bytes(run.config.read_bytes())
    save_file({"conv.weight": torch.zeros(3)}, other / "model.safetensors")
    assert main([str(other)]) == 2
    error = capsys.readouterr().err
    assert "not of the run's model" in error and error.count("\n") == 1


def test_all_names_of_a_tied_weight_are_exported_pruned(digits: Path, tmp_path: Path) -> None:
    """Fails when training cannot write tied weights, or the exported file holds the dense ones under a name."""
    config = small_config(tmp_path, digits, epochs=1)
    config.model = ModelConfig(name=f"{networks.__name__}:tied")
    assert train(config, ONE_PROCESS) == 0
    models = PrunedModels(RunFolder(config.run_dir), ONE_PROCESS)
    before = {name: tensor.clone() for name, tensor in models.model.state_dict().items()}
    models.export(models.at(0.75), AS_TRAINED, tmp_path / "pruned.safetensors")
    models.close()
    found = load_file(tmp_path / "pruned.safetensors")
    prune(models.model, 0.75)
    assert found.keys() == before.keys() and not torch.equal(found["3.weight"], before["3.weight"])
    assert all(torch.equal(found[name], tensor) for name, tensor in models.model.state_dict().items())


def test_another_pruning_does_not_overwrite_what_was_measured(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """A curve of which one point was pruned in another way would look like a result."""
    sweep_run(run, ONE_PROCESS, sparsities=[0.5])
    before = (run.prune / "s0.5000.json").read_bytes()
    assert main([str(run.path), "--granularity", "2:4"]) == 2
    assert "--scope weights --granularity weight --ranking global --criterion magnitude" in capsys.readouterr().err
    assert (run.prune / "s0.5000.json").read_bytes() == before


def test_a_result_in_the_older_words_is_the_same_pruning(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """A run from before cannot be measured again, or is measured in another way."""
    (result,) = sweep_run(run, ONE_PROCESS, sparsities=[0.5])
    path = run.prune / "s0.5000.json"
    old = {key: value for key, value in result.items() if key not in ("granularity", "ranking", "criterion")}
    path.write_text(json.dumps(old))
    (again,) = sweep_run(run, ONE_PROCESS, sparsities=[0.5])
    assert again == result
    path.write_text(json.dumps({**old, "kind": "layerwise"}))
    assert main([str(run.path), "--sparsities", "0.5"]) == 2
    assert "--granularity weight --ranking layerwise" in capsys.readouterr().err
