"""Frozen parameters stay as they are, without state, and join when they are trainable."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfw_dist import SFW, AdaGradSFW, KSparsePolytope, LpBall, ProjectedSGD, Unconstrained, constrain

SET = KSparsePolytope(k_frac=0.1, radius=0.05)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(16, 12, generator=generator), torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), targets).backward()
        optimizer.step()


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("kind", [SFW, AdaGradSFW])
def test_frozen_parameters_stay_bitwise_and_have_no_state(kind: type[SFW] | type[AdaGradSFW]) -> None:
    """Fails when a frozen layer is scaled into its set, or gets momentum."""
    net = network()
    net[0].requires_grad_(False)
    before = weights(net)
    optimizer = kind(constrain(net, SET), lr=0.1)
    train(net, optimizer, range(3))
    after = weights(net)
    assert all(torch.equal(after[name], before[name]) for name in ("0.weight", "0.bias"))
    assert not torch.equal(after["2.weight"], before["2.weight"])
    assert set(optimizer.state) == {p for layer in (net[2], net[4]) for p in layer.parameters()}
    assert set(optimizer.state_dict()["state"]) == {2, 3, 4, 5}


def test_projected_sgd_leaves_frozen_parameters() -> None:
    """Fails when a frozen tensor is projected when it is added."""
    net = network()
    net[0].requires_grad_(False)
    before = weights(net)
    optimizer = ProjectedSGD(constrain(net, LpBall(2, radius=0.1)), lr=0.1)
    train(net, optimizer, range(2))
    assert torch.equal(net[0].weight, before["0.weight"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.complex64])
def test_a_frozen_tensor_of_any_type_may_be_in_a_group(dtype: torch.dtype) -> None:
    """Fails when a quantised base next to adapters is refused, though torch's optimizers take it."""
    base = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    adapter = nn.Parameter(torch.ones(4))
    optimizer = SFW([{"params": [base, adapter], "constraint": Unconstrained(), "lr": 0.5}])
    adapter.grad = torch.ones(4)
    optimizer.step()
    assert adapter.tolist() == [0.5] * 4
    assert torch.equal(base.to(torch.complex64), torch.ones(4, 4, dtype=torch.complex64))


def test_an_unfrozen_layer_joins_as_if_added_then() -> None:
    """Fails when a layer that is unfrozen is not trained, or not as a layer that is added."""
    net, other = network(), network()
    for one in (net, other):
        one[0].requires_grad_(False)
        for p in one[0].parameters():
            p.mul_(0.01)  # into its set
    optimizer = SFW(constrain(net, SET), lr=0.1)
    later = SFW(constrain(nn.Sequential(*other[1:]), SET), lr=0.1)
    train(net, optimizer, range(3)), train(other, later, range(3))
    net[0].requires_grad_(True), other[0].requires_grad_(True)
    for group in constrain(other[0], SET):
        later.add_param_group(group)
    train(net, optimizer, range(3, 6)), train(other, later, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_an_unfrozen_layer_enters_its_set() -> None:
    """Fails when a layer that was outside of its set while it was frozen steps from there."""
    net = network()
    net[0].requires_grad_(False)
    optimizer = SFW(constrain(net, SET), lr=0.1)
    train(net, optimizer, range(1))
    assert SET.gauge(net[0].weight.detach()) > 2
    net[0].requires_grad_(True)
    train(net, optimizer, range(1, 2))
    assert SET.gauge(net[0].weight.detach()) <= 1 + 1e-5


def test_a_layer_that_is_frozen_for_a_while_keeps_its_momentum() -> None:
    """Fails when freezing a layer loses its momentum, or its old gradient moves it."""
    net, other = network(), network()
    optimizer, untouched = SFW(constrain(net, SET), lr=0.1), SFW(constrain(other, SET), lr=0.1)
    train(net, optimizer, range(3)), train(other, untouched, range(3))
    before = weights(net)
    net[0].requires_grad_(False)
    optimizer.step()  # the gradients of the last step are still there
    assert torch.equal(net[0].weight, before["0.weight"])
    assert not torch.equal(net[2].weight, before["2.weight"])
    net.load_state_dict(before)
    net[0].requires_grad_(True)
    momentum = optimizer.state[net[0].weight]["momentum_buffer"]
    assert torch.equal(momentum, untouched.state[other[0].weight]["momentum_buffer"])


def test_a_gradient_of_a_frozen_tensor_that_never_trained_is_refused() -> None:
    """Fails when gradients that a script sets by hand do nothing, without a word."""
    p = torch.ones(3)
    optimizer = SFW([{"params": [("adapter", p)], "constraint": Unconstrained()}])
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"adapter has a gradient and requires_grad=False: set requires_grad"):
        optimizer.step()


@pytest.mark.parametrize("when_saved", [True, False])
def test_states_with_frozen_layers_are_resumed_bitwise(when_saved: bool) -> None:
    """Fails when a state that was saved with, or before, a frozen layer cannot be loaded, or loses its momentum."""
    net = network()
    net[0].requires_grad_(not when_saved)
    optimizer = SFW(constrain(net, SET), lr=0.1)
    train(net, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    net[0].requires_grad_(False)
    train(net, optimizer, range(3, 5))
    net[0].requires_grad_(True)
    train(net, optimizer, range(5, 8))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network()
    resumed[0].requires_grad_(False)
    again = SFW(constrain(resumed, SET), lr=0.1)
    resumed.load_state_dict(saved["net"])
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, range(3, 5))
    resumed[0].requires_grad_(True)
    train(resumed, again, range(5, 8))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), resumed.parameters(), strict=True))
