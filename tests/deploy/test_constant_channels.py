"""Which channels are taken for constant."""

from __future__ import annotations

import torch
from torch import nn

from sfw_dist.deploy.constant_channels import fold, observe


def test_channels_that_are_switched_off_for_usual_inputs_vary() -> None:
    """Fails when a channel is taken for constant because an activation is 0 for all inputs of usual size."""
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        net[0].bias[:] = torch.tensor([-50.0, 0.0, 0.0])
        net[0].weight[2] = 0
    found = observe(net, torch.randn(1, 4).double())
    assert found[net[2]].constant.tolist() == [False, False, True]
    assert found[net[0]].live.tolist() == [True, True, False]


def test_a_constant_varies_behind_padding_of_zeros_unless_it_is_0() -> None:
    """Fails when a border is overlooked, as it is where a mean follows."""
    first, second = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 3, padding=1, groups=3)
    net = nn.Sequential(first, nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 2, 1)).double()
    with torch.no_grad():
        first.weight[:2] = 0
        first.bias[:] = torch.tensor([1.0, -1.0, 1.0])
    found = observe(net, torch.zeros(1, 1, 5, 5).double())
    assert found[second].live.tolist() == [True, False, True]
    assert found[net[4]].constant.tolist() == [False, True, False]
    assert found[net[4]].value[1] == second.bias[1]


def test_fold_adds_what_a_grouped_convolution_computes_of_constants() -> None:
    """Fails when a group's constants are added to another group's outputs."""
    layer = nn.Conv1d(4, 6, 3, groups=2)
    x = torch.zeros(1, 4, 3)
    x[0, 1], x[0, 2] = 2.0, -3.0
    expected = layer(x).flatten()
    fold(layer, [1, 2], torch.tensor([2.0, -3.0]))
    torch.testing.assert_close(layer.bias, expected)
