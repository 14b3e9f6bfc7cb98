"""``compact`` on the usual networks: smaller, and the same outputs."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import shufflenet_v2_x0_5

from sfw_dist.deploy import Compacted, compact
from sfw_dist.deploy.channel_graph import ChannelGraph, Group
from sfw_dist.errors import UserError
from sfw_dist.pruning import count_flops, prune
from tests.deploy.networks import NETWORKS, differs, network, set_zero, trained

EXAMPLE = torch.zeros(1, 3, 32, 32)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)))


SMALL_EXAMPLE = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_usual_networks_become_smaller_and_compute_the_same(name: str) -> None:
    """Fails when a channel goes that contributes, its constant is lost, or another layer's channel goes."""
    pruned = network(name)
    masks = prune(pruned, 0.5, granularity="filter", ranking="layerwise")
    found = compact(pruned, masks, EXAMPLE)
    assert differs(found.model, pruned, 3, 3, 32, 32) < 1e-5
    before, after = found.parameters
    assert (before, after) == (parameters(pruned), parameters(found.model))
    assert after < 0.8 * before
    assert found.flops == tuple(sum(count_flops(net, EXAMPLE).values()) for net in (pruned, found.model))
    assert found.flops[1] < 0.85 * found.flops[0]
    assert sum(found.removed.values()) > 0


@pytest.mark.parametrize("name", ["VGG-16", "DenseNet", "MobileNetV3"])
def test_in_float64_the_outputs_differ_by_rounding_alone(name: str) -> None:
    """Fails when the difference in float32 is more than rounding: what is folded is exact."""
    pruned = network(name).double()
    prune(pruned, 0.4, granularity="filter")
    found = compact(pruned, 0.0, EXAMPLE.double())
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(found.model(x), pruned(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["VGG-16", "ConvNeXt"])
def test_what_is_compacted_once_more_stays_as_it_is(name: str) -> None:
    """Fails when a second pass finds what the first one left, or a channel that stands for others is taken away."""
    once = compact(network(name), 0.5, EXAMPLE)
    twice = compact(once.model, 0.0, EXAMPLE)
    assert twice.removed == {}
    assert twice.parameters == (once.parameters[1], once.parameters[1])


def test_a_sparsity_stands_for_its_filter_masks() -> None:
    """Fails when a number prunes otherwise than ``prune`` does."""
    pruned = small_net()
    masks = prune(pruned, 0.5, granularity="filter")
    by_number, by_masks = compact(small_net(), 0.5, SMALL_EXAMPLE), compact(small_net(), masks, SMALL_EXAMPLE)
    assert by_number.removed == by_masks.removed == {"0": 4}
    for name, parameter in by_number.model.state_dict().items():
        assert torch.equal(parameter, by_masks.model.state_dict()[name])


def test_masks_of_weights_leave_whole_filters_dead_too() -> None:
    """Fails when only masks of the granularity filter are looked at."""
    net = small_net()
    set_zero(net, {"0": [1, 2]})
    masks = prune(net, 0.1, granularity="weight")
    assert compact(net, masks, SMALL_EXAMPLE).removed == {"0": 2}


def test_the_given_network_does_not_change() -> None:
    """Fails when the network that is compacted, its mode or its gradients' flags change."""
    net = small_net()
    net[0].weight.requires_grad_(False)
    net[1].train()
    before = copy.deepcopy(net.state_dict())
    found = compact(net, 0.5, SMALL_EXAMPLE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    for model in (net, found.model):
        assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True, True, True]
        assert [module.training for module in model] == [False, True, False, False, False]
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.float32}


def test_the_result_can_be_saved_and_its_state_loaded() -> None:
    """Fails when the result holds a hook or class that does not pickle, or sizes that its state does not fit."""
    found = compact(small_net(), 0.5, SMALL_EXAMPLE)
    file = io.BytesIO()
    torch.save(found.model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.load_state_dict(found.model.state_dict())
    assert differs(loaded, found.model, 2, 3, 8, 8) == 0
    assert {type(module).__module__.split(".")[0] for module in loaded.modules()} == {"torch"}


def test_bfloat16_stays_bfloat16() -> None:
    """Fails when the result is in the type in which it was computed."""
    found = compact(small_net().bfloat16(), 0.5, SMALL_EXAMPLE.bfloat16())
    assert {tensor.dtype for tensor in found.model.state_dict().values()} == {torch.bfloat16, torch.int64}


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.dropout(self.first(x), 0.5, True))


class InFloat32(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.float()))


class Counting(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).argmax(1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Noisy, "Noisy returns other outputs each time"),
        (InFloat32, "InFloat32 does not run in float64"),
        (Counting, "Counting returns no finite tensors"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(make: type[nn.Module], words: str) -> None:
    """Fails when a network is compacted without a check of what it computes, and when that ends in a traceback."""
    with pytest.raises(UserError, match=words) as error:
        compact(make(), 0.5, torch.randn(1, 4))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"keep": ["0", "8"]}, "keep names 8"),
        ({"pruning": 1.5}, "sparsity"),
        ({"pruning": "other"}, "lacks it"),
        ({"pruning": "rank", "zero_bias": True}, "of low rank: leave them out"),
        ({"example": (SMALL_EXAMPLE,)}, "example is a tuple"),
        ({"example": SMALL_EXAMPLE.long()}, "example is of torch.int64"),
        ({"example": torch.zeros(1, 1, 8, 8)}, "does not run .*RuntimeError"),
    ],
    ids=["keep", "sparsity", "model", "rank", "tuple", "integers", "shape"],
)
def test_arguments_that_do_not_fit_are_refused(arguments: Mapping[str, object], words: str) -> None:
    """Fails when a misspelt name is ignored, or masks of another model are."""
    given: dict[str, object] = {"pruning": 0.5, "example": SMALL_EXAMPLE, **arguments}
    if given["pruning"] == "other":
        given["pruning"] = prune(network("ViT"), 0.5, granularity="filter")
    if given["pruning"] == "rank":
        given["pruning"] = prune(small_net(), 0.5, granularity="rank")
    with pytest.raises(UserError, match=words):
        compact(small_net(), **given)  # type: ignore[arg-type]


class Shuffled(nn.Module):
    """Channels of which the order changes by a transposition, which torch-pruning does not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        return self.last(self.between(x))


def test_what_torch_pruning_does_not_follow_stays_with_the_reason() -> None:
    """Fails when a wrong width ends the whole compaction, or passes without being noticed."""
    net = set_zero(trained(Shuffled()), {"first": [1, 2], "between": [0, 3, 4]})
    found = compact(net, 0.0, torch.randn(1, 3, 4, 4))
    assert found.removed == {"between": 3}
    assert sum(found.kept_because["first"].values()) == 2
    assert differs(found.model, net, 2, 3, 4, 4) < 1e-5


def test_a_layer_at_which_torch_pruning_fails_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when an error at one layer ends the compaction, or is met again and again."""
    group = ChannelGraph.group

    def failing(graph: ChannelGraph, layer: nn.Module, channels: Sequence[int]) -> Group:
        if layer.weight.shape[1] == 6:
            raise IndexError
        return group(graph, layer, channels)

    monkeypatch.setattr(ChannelGraph, "group", failing)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    found = compact(set_zero(trained(net), {"0": [1], "2": [3, 4]}), 0.0, torch.randn(1, 4))
    assert found.removed == {"0": 1} and sum(found.kept_because["2"].values()) == 2


def test_named_layers_keep_their_filters() -> None:
    """Fails when ``keep`` is not followed."""
    found: Compacted = compact(small_net(), 0.5, SMALL_EXAMPLE, keep=["0"])
    assert found.removed == {} and found.kept_because == {"0": {"keep names it": 4}}


def test_a_network_that_torch_pruning_fails_on_is_refused_in_one_line() -> None:
    """Fails when an error of torch-pruning's own reaches the user."""
    with pytest.raises(UserError, match="torch-pruning does not follow ShuffleNetV2") as error:
        compact(trained(shufflenet_v2_x0_5(num_classes=4)), 0.5, torch.zeros(1, 3, 32, 32))
    assert "\n" not in str(error.value)
