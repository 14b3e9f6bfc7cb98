"""BatchNorm's statistics after recalibration; tests/multiprocess has several ranks, tests/evaluate the accuracy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sfw_dist.errors import UserError
from sfw_dist.models import build_model
from sfw_dist.pruning import prune
from sfw_dist.pruning.recalibration import batch_norms, recalibrate, recalibrated_statistics
from tests.support.pruning import compute_masks
from tests.support.training import ONE_PROCESS


def _model() -> nn.Module:
    """BatchNorm with statistics from earlier training, dropout, and a second BatchNorm after the first."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.9), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
    )
    for norm in batch_norms(model).values():
        nn.init.normal_(norm.weight)
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.num_batches_tracked += 7
    return model


def _batches(count: int = 5) -> list[Tensor]:
    return [3 * torch.randn(4 + i, 3, 8, 8) + i for i in range(count)]


def _float64_statistics(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """The definition, layer by layer: the mean over the batches of each batch's mean and unbiased variance."""
    sums: dict[str, Tensor] = {}
    for x in batches:
        x = x.double()
        for name, layer in model.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=1)
                for key, value in (("running_mean", mean), ("running_var", var)):
                    sums[f"{name}.{key}"] = sums.get(f"{name}.{key}", torch.zeros(())) + value / len(batches)
                centred = (x - mean[:, None, None]) / (x.var((0, 2, 3), correction=0) + layer.eps).sqrt()[:, None, None]
                x = centred * layer.weight.double()[:, None, None] + layer.bias.double()[:, None, None]
            elif not isinstance(layer, nn.Dropout):
                x = copy.deepcopy(layer).double()(x)
    return sums


def test_statistics_are_the_mean_over_the_batches() -> None:
    """Momentum weighs the last batches more, old statistics shine through, or dropout acts meanwhile."""
    model, batches = _model(), _batches()
    with torch.no_grad():
        expected = _float64_statistics(model, batches)
    assert recalibrate(model, iter(batches)) == 5
    state = model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(state[name].double(), value, rtol=2e-5, atol=2e-6)
    assert {int(norm.num_batches_tracked) for norm in batch_norms(model).values()} == {5}


def test_weights_modes_and_momenta_stay() -> None:
    """Recalibration trains; or a network that goes on training afterwards does so with other settings."""
    model = _model()
    model.train()
    model[1].eval()  # frozen
    model[5].momentum = 0.25
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    recalibrate(model, _batches())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert [norm.momentum for norm in batch_norms(model).values()] == [0.1, 0.25]
    with pytest.raises(RuntimeError):
        recalibrate(model, [torch.zeros(2, 5, 8, 8)])
    assert [module.training for module in model.modules()] == modes


def test_many_networks_in_one_pass_are_each_as_if_alone() -> None:
    """Statistics of one sparsity leak into another's, or the model itself is changed."""
    model, batches = _model().eval(), _batches()
    before = copy.deepcopy(model.state_dict())
    sparsities = (0.9, 0.0, 0.5)
    masks = [compute_masks(model, sparsity) for sparsity in sparsities]
    together = recalibrated_statistics(model, masks, iter(batches), ONE_PROCESS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for sparsity, statistics in zip(sparsities, together, strict=True):
        alone = copy.deepcopy(model)
        prune(alone, sparsity)
        recalibrate(alone, batches)
        expected = {name: buffer for name, buffer in alone.named_buffers()}
        assert statistics.keys() == expected.keys()
        assert all(torch.equal(statistics[name], expected[name]) for name in expected)
        assert all(statistics[name].dtype == expected[name].dtype for name in expected)


def test_without_batchnorm_nothing_is_done() -> None:
    """A network without BatchNorm is an error, or runs over all the data for nothing."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert batch_norms(model) == {} and recalibrate(model, iter(int, 1)) == 0  # type: ignore[arg-type]
    masks = [compute_masks(model, 0.5)] * 2
    assert recalibrated_statistics(model, masks, [], ONE_PROCESS) == [{}, {}]
    assert recalibrated_statistics(_model(), [], [], ONE_PROCESS) == []


def test_no_batch_leaves_the_statistics() -> None:
    """They are reset and then not measured: the network is worthless, and nobody is told."""
    model = _model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="give at least one"):
        recalibrate(model, [])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["cnn5", "resnet18", "vgg16", "torchvision/mobilenet_v3_small"])
def test_every_model_takes_it(name: str) -> None:
    """A layer that is not found keeps the statistics of the dense network."""
    width = 1.0 if "/" in name else 0.0625
    model = build_model(name, num_classes=10, in_channels=3, width=width)
    assert batch_norms(model) and recalibrate(model, [torch.randn(4, 3, 32, 32)] * 2) == 2
    assert {int(norm.num_batches_tracked) for norm in batch_norms(model).values()} == {2}
