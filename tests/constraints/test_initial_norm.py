"""The norm that tau refers to: the expected one of an initializer, or the present one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sfw_dist.constraints import expected_initial_norm
from sfw_dist.constraints.initial_norm import (
    Draws,
    InitialNorm,
    Size,
    Spread,
    choose_norm,
    drawn_norms,
    present_size,
)

# The expected norm


@pytest.mark.parametrize(
    ("module", "fan_in"),
    [
        (nn.Linear(64, 32), 64),
        (nn.Linear(1000, 200), 1000),
        (nn.Conv2d(3, 16, 3), 27),
        (nn.Conv2d(64, 64, 3), 576),
        (nn.Conv2d(32, 64, 3, groups=4), 72),
        (nn.Conv1d(8, 40, 5), 40),
    ],
    ids=str,
)
def test_linear_and_conv_norms_are_the_closed_forms(module: nn.Module, fan_in: int) -> None:
    """Both draw uniformly within ±1/√fan_in: ``E‖W‖ ≈ √n · (1/√fan_in) / √3``."""
    for name, parameter in module.named_parameters():
        closed = math.sqrt(parameter.numel()) / math.sqrt(fan_in) / math.sqrt(3)
        assert expected_initial_norm(module, name) == pytest.approx(closed, rel=0.02)


def test_norms_of_constant_initializers_are_exact() -> None:
    """Ones have norm √n; zeros count as 1, or the tensor could never move."""
    for layer, n in ((nn.BatchNorm2d(48), 48), (nn.LayerNorm([4, 5]), 20), (nn.GroupNorm(3, 12), 12)):
        assert expected_initial_norm(layer, "weight") == pytest.approx(math.sqrt(n), rel=1e-6)
        assert expected_initial_norm(layer, "bias") == 1.0
    assert expected_initial_norm(nn.Embedding(500, 40), "weight") == pytest.approx(math.sqrt(20_000), rel=0.02)


def test_present_weights_do_not_matter() -> None:
    """The expected norm is the initializer's alone."""
    layer = nn.Linear(64, 32)
    before = expected_initial_norm(layer, "weight")
    with torch.no_grad():
        layer.weight.mul_(100)
    assert expected_initial_norm(layer, "weight") == before


def test_module_without_an_initializer_counts_with_its_present_norm() -> None:
    """There is nothing to draw from; and a tensor of zeros counts as 1."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.tensor([[3.0, 4.0]]))
            self.position = nn.Parameter(torch.zeros(2, 2))

    assert expected_initial_norm(Bare(), "token") == pytest.approx(5.0)
    assert expected_initial_norm(Bare(), "position") == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_norm_in_other_types(dtype: torch.dtype) -> None:
    """A norm rounded to bfloat16 is off by 0.1 %."""
    assert expected_initial_norm(nn.BatchNorm2d(48, dtype=dtype), "weight") == pytest.approx(math.sqrt(48), rel=1e-6)
    closed = math.sqrt(250 / 3)
    assert expected_initial_norm(nn.Linear(400, 250, dtype=dtype), "weight") == pytest.approx(closed, rel=0.02)


# What may be drawn


MODULES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "scalars": (lambda: nn.Linear(1, 1), 100),
    "few": (lambda: nn.Linear(3, 2), 100),
    "embedding": (lambda: nn.Embedding(2, 4), 100),
    "recurrent": (lambda: nn.LSTM(2, 1), 100),
    "attention": (lambda: nn.MultiheadAttention(4, 1, add_bias_kv=True), 100),
    "linear": (lambda: nn.Linear(64, 32), 100),
    "constant": (lambda: nn.BatchNorm1d(7), 3),
    "large": (lambda: nn.Linear(400, 300), 5),
    "bfloat16": (lambda: nn.Linear(300, 200, dtype=torch.bfloat16), 5),
}


@pytest.mark.parametrize("kind", MODULES)
def test_what_the_initializer_draws_is_allowed(kind: str) -> None:
    """Fails when a layer fresh from its initializer is taken for one that the model initialised otherwise: its radius
    would then depend on the rank's draw.
    """
    make, seeds = MODULES[kind]
    drawn = None
    for seed in range(seeds):
        torch.manual_seed(seed)
        module = make()
        parameters = dict(module.named_parameters(recurse=False))
        drawn = drawn or drawn_norms(module, list(parameters))
        assert drawn.keys() == parameters.keys()
        for name, parameter in parameters.items():
            assert drawn[name].allow(present_size(parameter)), (name, seed)


def normal(std: float) -> Callable[[Tensor], object]:
    return lambda x: nn.init.normal_(x, std=std)


@pytest.mark.parametrize(
    ("module", "initialise"),
    [
        (nn.Embedding(2, 64), normal(0.02)),
        (nn.Embedding(1000, 64), normal(0.02)),
        (nn.Linear(192, 192), normal(0.02)),
        (nn.Linear(768, 768), normal(0.02)),  # 4 % less than torch's own
        (nn.Linear(192, 576), lambda x: nn.init.trunc_normal_(x, std=0.02)),
        (nn.Linear(64, 64), nn.init.xavier_uniform_),
        (nn.Conv2d(3, 64, 7), lambda x: nn.init.kaiming_normal_(x, mode="fan_out", nonlinearity="relu")),
        (nn.LayerNorm(64), lambda x: nn.init.constant_(x, 0.1)),
        # Of 64 entries; their norms are within 10·σ + 40·σ² of torch's own, 1.7 times as large.
        (nn.Linear(8, 8), nn.init.xavier_uniform_),
        (nn.Linear(8, 8), nn.init.orthogonal_),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_another_initialisation_is_seen(module: nn.Module, initialise: Callable[[Tensor], object]) -> None:
    """Fails when nanoGPT's, timm's or torchvision's own initialisation passes for torch's: radii of other weights."""
    weight = module.get_parameter("weight")
    drawn = drawn_norms(module, ["weight"])["weight"]
    torch.manual_seed(0)
    with torch.no_grad():
        initialise(weight)
    assert not drawn.allow(present_size(weight))


def test_allowed_sizes_follow_the_formula() -> None:
    """Norms: e^±max(0.01, 10·σ + 40·σ²) about the mean; a constant is exact but for 1 %. Largest entries: 20·σ above
    the mean and 30·σ below.
    """
    for sigma, most in ((0.0, 0.01), (0.0005, 0.01), (0.01, 0.104), (0.5, 15.0)):
        for sign in (-1, 1):
            draws = Draws(Spread(3.0, sigma), None)
            assert draws.allow(Size(3 * math.exp(sign * most * 0.999), 1.0))
            assert not draws.allow(Size(3 * math.exp(sign * most * 1.001), 1.0))
    for exponent in (0.2, -0.3):
        draws = Draws(Spread(3.0, 0.1), Spread(2.0, 0.01))
        assert draws.allow(Size(3.0, 2 * math.exp(exponent * 0.999)))
        assert not draws.allow(Size(3.0, 2 * math.exp(exponent * 1.001)))
    zeros, some = Draws(Spread(0.0, 0.0), None), Draws(Spread(3.0, 0.1), None)
    assert zeros.allow(Size(0.0, 0.0)) and not zeros.allow(Size(1e-9, 1e-9)) and not some.allow(Size(0.0, 0.0))


# Which norm counts


def draws(mean: float, deviation: float) -> Draws:
    return Draws(Spread(mean, deviation), None)


@pytest.mark.parametrize(
    ("drawn", "present", "auto", "initializer"),
    [
        ([draws(4.0, 0.01)], 4.1, InitialNorm(4.0, "initializer"), InitialNorm(4.0, "initializer")),
        ([draws(4.0, 0.01)], 5.0, InitialNorm(5.0, "present"), InitialNorm(4.0, "initializer")),
        ([draws(4.0, 0.01)], 0.0, InitialNorm(4.0, "initializer"), InitialNorm(4.0, "initializer")),
        ([draws(4.0, 0.01)], 1e-5, InitialNorm(4.0, "initializer"), InitialNorm(4.0, "initializer")),
        ([draws(0.0, 0.0)], 0.0, InitialNorm(1.0, "1 for zeros"), InitialNorm(1.0, "1 for zeros")),
        ([draws(0.0, 0.0)], 5.0, InitialNorm(5.0, "present"), InitialNorm(1.0, "1 for zeros")),
        ([], 5.0, InitialNorm(5.0, "present"), InitialNorm(5.0, "present")),
        ([], 1e-5, InitialNorm(1.0, "1 for zeros"), InitialNorm(1.0, "1 for zeros")),
        # Shared by two modules: whose initializer allows the present norm, else the present one.
        ([draws(4.0, 0.01), draws(9.0, 0.01)], 9.1, InitialNorm(9.0, "initializer"), InitialNorm(4.0, "initializer")),
        ([draws(4.0, 0.01), draws(9.0, 0.01)], 6.0, InitialNorm(6.0, "present"), InitialNorm(4.0, "initializer")),
        ([draws(4.0, 0.1), draws(4.1, 0.1)], 4.2, InitialNorm(4.0, "initializer"), InitialNorm(4.0, "initializer")),
        ([draws(4.0, 0.01), draws(0.0, 0.0)], 0.0, InitialNorm(4.0, "initializer"), InitialNorm(4.0, "initializer")),
    ],
)
def test_which_norm_counts(drawn: list[Draws], present: float, auto: InitialNorm, initializer: InitialNorm) -> None:
    """The rule of constrain's docstring, whatever the order of the modules that share a parameter."""
    for order in (drawn, drawn[::-1]):
        assert choose_norm(order, 100, lambda: Size(present, present), "auto") == auto
        assert choose_norm(order, 100, lambda: Size(present, present), "initializer") == initializer


# The copy that is drawn on


def test_a_parameter_that_the_initializer_does_not_set_has_no_draws() -> None:
    """Fails when its norm is read from memory that nothing has written, which is another one on every rank."""

    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.scale = nn.Parameter(torch.full((3,), 2.0))

    assert drawn_norms(Scaled(), ["weight", "scale"]).keys() == {"weight"}
    assert expected_initial_norm(Scaled(), "scale") == pytest.approx(math.sqrt(12))


def test_multihead_attention_is_drawn_by_its_own_initializer() -> None:
    """Fails when its weights' norm depends on the seed. Xavier's variance is 2/(192 + 64)."""
    attention = nn.MultiheadAttention(64, 4)
    closed = math.sqrt(192 * 64 * 2 / (192 + 64))
    assert expected_initial_norm(attention, "in_proj_weight") == pytest.approx(closed, rel=0.01)
    torch.manual_seed(5)
    assert expected_initial_norm(nn.MultiheadAttention(64, 4), "in_proj_weight") == expected_initial_norm(
        attention, "in_proj_weight"
    )


class Property(nn.Module):
    """With torch's initializer, which finds another layer's weight behind a property."""

    other = nn.Linear(4, 4)
    reset_parameters = nn.Linear.reset_parameters

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(4))

    @property
    def weight(self) -> Tensor:
        return self.other.weight.data


class Closure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = weight = nn.Parameter(torch.full((4,), 3.0))
        self.initialise = lambda: weight.data.zero_()

    def reset_parameters(self) -> None:
        self.initialise()
        torch.manual_seed(7)


def test_initializers_that_are_not_torchs_are_not_called() -> None:
    """Fails when one that reaches the model itself, through a closure say, overwrites its weights."""
    closure = Closure()
    before = torch.get_rng_state()
    assert expected_initial_norm(closure, "weight") == pytest.approx(6.0)
    assert torch.equal(closure.weight, torch.full((4,), 3.0))
    assert torch.equal(torch.get_rng_state(), before)
    layer = Property()
    before = torch.get_rng_state()
    other = Property.other.weight.detach().clone()
    assert expected_initial_norm(layer, "bias") == pytest.approx(layer.bias.norm().item())
    assert torch.equal(Property.other.weight, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_initializer_of_a_copy_does_not_reach_the_module() -> None:
    """Through tensors that are no parameters (old spectral_norm's ``weight`` shares memory with ``weight_orig``),
    lists of modules, and initializers set on the module itself. Fails when any entry changes.
    """

    spectral = nn.utils.spectral_norm(nn.Linear(6, 5))
    original = spectral.weight_orig.detach().clone()
    linear = nn.Linear(6, 5)
    linear.reset_parameters = lambda: linear.weight.data.zero_()  # type: ignore[method-assign, return-value]
    kept = linear.weight.detach().clone()

    expected_initial_norm(spectral, "weight_orig")
    assert torch.equal(spectral.weight_orig, original) and torch.equal(spectral.weight, original)
    expected_initial_norm(linear, "weight")
    assert torch.equal(linear.weight, kept)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_draws_are_made_on_the_cpu_whatever_the_default_device(device: str) -> None:
    """Fails when the copy lies on torch's default device, which may have no memory."""
    layer = nn.LayerNorm(16)
    with torch.device(device):
        assert expected_initial_norm(layer, "weight") == 4.0
