"""Networks of others in the application: they train, are pruned, recalibrated, measured and reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfw_dist.config import Config, ModelConfig, load_config
from sfw_dist.errors import UserError
from sfw_dist.evaluate.__main__ import main as evaluate
from sfw_dist.report.__main__ import main as report
from sfw_dist.train import trainer as training
from tests.support import networks
from tests.support.training import ONE_PROCESS, small_config

OWN = f"{networks.__name__}:"
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
NETWORKS: dict[str, ModelConfig] = {
    "vit": ModelConfig("timm/vit_tiny_patch16_224", kwargs=VIT),
    "torch's vit": ModelConfig(f"{OWN}vit"),
    "swin": ModelConfig(f"{OWN}swin", kwargs={"width": 4}),
    "convnext": ModelConfig("timm/convnext_atto", kwargs={"depths": [1] * 4, "dims": [4, 4, 8, 8], "patch_size": 1}),
    "mobilenet": ModelConfig("torchvision/mobilenet_v3_small", kwargs={"width_mult": 0.1}),
    "named outputs": ModelConfig(f"{OWN}named"),
}


@pytest.fixture
def config(tmp_path: Path, digits: Path) -> Config:
    """Two steps."""
    config = small_config(tmp_path / "runs", digits, lr=0.1)
    config.data = replace(config.data, batch_size=1200)
    return config


def _train(config: Config, model: ModelConfig, name: str = "small", *, resume: bool = False) -> Path:
    config = replace(config, name=name, model=model)
    assert training.train(config, ONE_PROCESS, resume=resume) == 0
    return config.run_dir


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_train_and_are_pruned_measured_and_reported(
    config: Config, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when a command builds another network than was trained, or takes its output for something else."""
    run = _train(config, NETWORKS[name])
    assert load_config(run / "config.yaml").model == NETWORKS[name]
    capsys.readouterr()
    assert evaluate([str(run), "--sparsities", "0,0.9", "--json"]) == 0
    dense, pruned = json.loads(capsys.readouterr().out)
    assert pruned["bn_recalibrated"] == (name == "mobilenet")
    assert dense["flops"] == dense["flops_dense"] > pruned["flops"]
    fixed = {"vit": 2 * 2 * 5 * 5 * 8, "torch's vit": 2 * 2 * 5 * 5 * 8}  # products of 5 tokens of 8 numbers
    assert pruned["flops"] > fixed.get(name, 0)
    weights = {layer["name"]: layer["kept"] / layer["parameters"] for layer in pruned["layers"]}
    if name == "torch's vit":
        assert weights["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"] < 1
    if name == "swin":  # figures take as long as all else
        assert report([str(run)]) == 0


def test_a_run_starts_from_the_weights_of_another(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when fine-tuning begins with new weights, or a resume or an evaluation needs the file it began from."""
    first = _train(config, NETWORKS["vit"], "first")
    start = config.run_dir.parent / "start.safetensors"
    tensors = load_file(first / "model.safetensors")
    tensors["head.weight"], tensors["head.bias"] = torch.zeros(3, 8), torch.zeros(3)
    save_file(tensors, start)
    config.optimizer.lr = 1e-6
    tuned = replace(NETWORKS["vit"], pretrained=str(start))
    capsys.readouterr()
    run = _train(config, tuned, "second")
    assert "note: head.weight (10, 8), head.bias (10,) begin anew" in capsys.readouterr().err
    trained = load_file(run / "model.safetensors")
    name = "blocks.0.attn.qkv.weight"
    torch.testing.assert_close(trained[name], tensors[name], rtol=1e-3, atol=1e-4)

    start.unlink()
    (run / "model.safetensors").unlink()
    for newest in sorted((run / "checkpoints").glob("epoch_*"))[1:]:
        for file in newest.iterdir():
            file.unlink()
        newest.rmdir()
    _train(config, tuned, "second", resume=True)
    resumed = load_file(run / "model.safetensors")
    assert all(torch.equal(resumed[key], trained[key]) for key in trained)
    assert evaluate([str(run), "--sparsities", "0.5"]) == 0


def test_a_start_that_has_changed_is_told_before_the_first_checkpoint(config: Config) -> None:
    """Fails when a run that never reached a checkpoint begins from other weights than its record says."""
    first = _train(config, NETWORKS["named outputs"], "first")
    start = first / "model.safetensors"
    tuned = replace(NETWORKS["named outputs"], pretrained=str(start))
    run = _train(config, tuned, "second")
    for path in sorted((run / "checkpoints").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    _train(config, tuned, "second", resume=True)
    for path in sorted((run / "checkpoints").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    save_file({name: tensor + 1 for name, tensor in load_file(start).items()}, start)
    with pytest.raises(UserError, match=r"model.safetensors has changed since .*second began with it: choose another"):
        _train(config, tuned, "second", resume=True)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (ModelConfig("timm/vit_tiny_patch16_224"), "cannot take images of 1×8×8 (AssertionError: Input height (8)"),
        (ModelConfig("torchvision/inception_v3"), "cannot take images of 1×8×8 (RuntimeError"),
        (ModelConfig("cnn", width=0.1, pretrained=True), "cnn has no published weights"),
        (ModelConfig("cnn", width=0.1, kwargs={"depth": 3}), "cnn takes no model.kwargs, got depth"),
    ],
    ids=["vit", "inception", "published", "kwargs"],
)
def test_a_network_that_does_not_fit_is_told_before_the_run_exists(
    config: Config, model: ModelConfig, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when it is a traceback, or the folder of a run that cannot train is in the way of the next one."""
    monkeypatch.setattr("torch.nn.init.trunc_normal_", lambda tensor, *_, **__: tensor)  # seconds, for inception
    with pytest.raises(UserError) as caught:
        _train(config, model)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert not config.run_dir.exists()


def test_kwargs_are_part_of_what_a_run_is(config: Config) -> None:
    """Fails when a run is resumed as another network."""
    _train(config, NETWORKS["swin"])
    other: dict[str, Any] = {"width": 8}
    with pytest.raises(UserError, match=r"model.kwargs.width is 8, was 4"):
        _train(config, ModelConfig(f"{OWN}swin", kwargs=other), resume=True)
