"""Which channels go, which stay and why, in networks of a few layers each of which shows one case."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sfw_dist.deploy import Compacted, compact
from tests.deploy.networks import differs, set_zero, trained

EXAMPLE = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(3))


def compacted(net: nn.Module, dead: dict[str, list[int]], example: Tensor = EXAMPLE, **options: bool) -> Compacted:
    """The network after its filters of these numbers were set to zero; its outputs are compared on other inputs."""
    set_zero(trained(net), dead)
    found = compact(net, 0.0, example, **options)
    if not options:
        assert differs(found.model, net, 4, *example.shape[1:]) < 1e-5
    return found


class Net(nn.Module):
    """Layers by name, and what is computed with them."""

    def __init__(self, forward: Callable[[Net, Tensor], object], **layers: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> object:
        return self._forward(self, x)


def reasons(found: Compacted, layer: str) -> str:
    return " | ".join(found.kept_because.get(layer, {}))


def test_constants_beside_padding_are_borne_by_one_channel() -> None:
    """Fails when the borders of a padded convolution get a share of the bias, or no channel goes there."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 4, 3, padding=1))
    found = compacted(net, {"0": [0, 2, 5, 7]})
    assert found.removed == {"0": 3}
    assert differs(found.model, net, 2, 3, 11, 9) < 1e-5  # of another size


@pytest.mark.parametrize("options", [{"padding": 0}, {"padding": 1, "padding_mode": "circular"}, {"padding": "valid"}])
def test_constants_go_to_the_bias_where_no_zeros_are_padded(options: dict[str, object]) -> None:
    """Fails when a channel stays that need not; the layer has no bias before."""
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 4, 3, bias=False, **options)
    found = compacted(nn.Sequential(*layers), {"0": [0, 2]})
    assert found.removed == {"0": 2} and found.kept_because == {}
    assert found.model[3].bias is not None


def test_two_readers_that_pad_share_the_channel_that_stays() -> None:
    """Fails when the weights of one of two readers are merged by the other one's constants."""
    net = Net(
        lambda net, x: net.left(y := net.first(x)) + net.right(net.norm(y).sigmoid()),
        first=nn.Conv2d(3, 8, 1),
        norm=nn.BatchNorm2d(8),
        left=nn.Conv2d(8, 4, 3, padding=1),
        right=nn.Conv2d(8, 4, 3, padding=1),
    )
    assert compacted(net, {"first": [1, 2, 3]}).removed == {"first": 2}


def residual(net: Net, x: Tensor) -> Tensor:
    x = net.norm0(net.conv0(x)).relu()
    return net.head((x + net.norm1(net.conv1(x))).relu())


def residual_net() -> Net:
    layers: dict[str, nn.Module] = {"conv0": nn.Conv2d(3, 6, 3), "norm0": nn.BatchNorm2d(6)}
    layers |= {"conv1": nn.Conv2d(6, 6, 1), "norm1": nn.BatchNorm2d(6), "head": nn.Conv2d(6, 4, 1)}
    return Net(residual, **layers)


def test_of_a_residual_sum_a_channel_goes_where_all_summands_are_dead() -> None:
    """Fails when a live summand is removed, or dead ones stay together."""
    found = compacted(residual_net(), {"conv0": [1, 2], "conv1": [2, 3]})
    assert found.removed == {"conv0": 1, "conv1": 1}
    assert "vary" in reasons(found, "conv0") and "vary" in reasons(found, "conv1")


def test_of_concatenated_layers_each_loses_its_own_channels() -> None:
    """Fails when the numbers of channels are mistaken behind a concatenation."""
    net = Net(
        lambda net, x: net.head(torch.cat([net.a(x), net.whole(x), net.b(x)], 1)),
        a=nn.Conv2d(3, 4, 1),
        whole=nn.Conv2d(3, 3, 1),
        b=nn.Conv2d(3, 5, 1),
        head=nn.Conv2d(12, 2, 1),
    )
    found = compacted(net, {"a": [0, 3], "b": [1]})
    assert found.removed == {"a": 2, "b": 1}
    assert found.model.head.in_channels == 9


def test_what_depends_on_dead_channels_alone_is_dead_too() -> None:
    """Fails when only filters of zeros are found."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        net[2].weight[3] = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    found = compacted(net, {"0": [1, 3]}, torch.randn(1, 4))
    assert found.removed == {"0": 2, "2": 1}


def test_groups_of_a_convolution_lose_equally_many_channels() -> None:
    """Fails when a grouped convolution's weight is cut at the same places in all groups."""
    first, grouped, last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 1)
    found = compacted(nn.Sequential(first, nn.ReLU(), grouped, last), {"0": [0, 1, 2, 6], "2": [3, 4, 7]})
    assert found.removed == {"0": 2, "2": 2}
    assert reasons(found, "0") == reasons(found, "2") == "all groups of a convolution lose equally many"


def inverted_residual(net: Net, x: Tensor) -> Tensor:
    x = net.norm0(net.expand(x)).relu()
    x = nn.functional.hardswish(net.norm1(net.depthwise(x)))
    return net.project(x * net.gate(x.mean((2, 3), keepdim=True)).sigmoid())


def inverted_residual_net() -> Net:
    layers: dict[str, nn.Module] = {"expand": nn.Conv2d(3, 8, 1), "norm0": nn.BatchNorm2d(8)}
    layers["depthwise"] = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    layers |= {"norm1": nn.BatchNorm2d(8), "gate": nn.Conv2d(8, 8, 1), "project": nn.Conv2d(8, 4, 1)}
    return Net(inverted_residual, **layers)


def test_a_constant_that_a_live_gate_multiplies_stays() -> None:
    """Fails when the gate is taken for a constant, as where its sigmoid is 0 for all that was tried."""
    found = compacted(inverted_residual_net(), {"expand": [0, 1], "depthwise": [0, 1]})
    assert found.removed == {} and "project reads values that vary" in reasons(found, "expand")


def test_with_biases_of_zero_depthwise_convolutions_lose_channels() -> None:
    """Fails when what follows a channel of zeros is not dead, or the other network is not the one compared with."""
    net = inverted_residual_net()
    found = compacted(net, {"expand": [0, 1], "gate": [5]}, zero_bias=True)
    assert found.removed == {"expand": 2, "depthwise": 2, "gate": 2}
    assert found.max_difference < 1e-6 < differs(found.model, net, 2, 3, 6, 6)
    assert net.norm1.bias[0] != 0  # of the given network


@pytest.mark.filterwarnings("ignore:not pruned")  # a parametrized weight
@pytest.mark.parametrize(
    ("between", "words"),
    [
        (nn.LayerNorm([8, 6, 6]), "LayerNorm"),
        (nn.GroupNorm(2, 8), "GroupNorm"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), "in its own way"),
    ],
    ids=["layer norm", "group norm", "parametrization"],
)
def test_channels_stay_before_what_computes_with_all_of_them(between: nn.Module, words: str) -> None:
    """Fails when a mean over channels is taken over fewer of them."""
    found = compacted(nn.Sequential(nn.Conv2d(3, 8, 1), between, nn.Conv2d(8, 2, 1)), {"0": [1, 2]})
    assert found.removed == {} and words in reasons(found, "0")


def test_what_is_returned_and_what_is_shared_stays() -> None:
    """Fails when features are returned with fewer channels, or a tied weight is torn apart."""
    net = Net(
        lambda net, x: {"features": net.first(x), "out": net.last(net.tied(net.tied_too(x.sigmoid())))},
        first=nn.Conv2d(3, 4, 1),
        tied=nn.Conv2d(3, 3, 1),
        tied_too=nn.Conv2d(3, 3, 1),
        last=nn.Conv2d(3, 2, 1),
    )
    net.tied.weight = net.tied_too.weight
    set_zero(trained(net), {"first": [1], "tied": [0]})
    found = compact(net, 0.0, EXAMPLE)
    assert found.removed == {}
    assert reasons(found, "first") == "the network returns it" and "shares a parameter" in reasons(found, "tied")


def test_a_layer_that_is_dead_as_a_whole_keeps_one_channel() -> None:
    """Fails when a layer without any channel is made."""
    found = compacted(
        Net(
            lambda net, x: net.skip(x) + net.second(net.first(x)),
            first=nn.Conv2d(3, 4, 1),
            second=nn.Conv2d(4, 2, 1),
            skip=nn.Conv2d(3, 2, 1),
        ),
        {"first": [0, 1, 2, 3]},
    )
    assert found.removed == {"first": 3} and reasons(found, "first") == "the layer's last channel"
