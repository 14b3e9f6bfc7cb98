"""The model and all random generators stay as they are, whatever an initializer does."""

from __future__ import annotations

import logging
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sfw_dist.constraints import LpBall, bindings, expected_initial_norm
from sfw_dist.constraints.initial_norm import drawn_norms


class Own(nn.Module):
    """A module with one weight and an initializer of its own."""

    def __init__(self, initialise: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))
        self.initialise = initialise

    def reset_parameters(self) -> None:
        self.initialise(self.weight.data)


class Reaching(nn.Module):
    """A layer whose initializer reaches its weight in another way than by its attribute."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 8))
        self.register_buffer("count", torch.zeros(3))
        self.steps, self.log, self.level = Steps(), [0], 0
        self.counts = Counter(calls=0)
        self.mine = self
        weight, log = self.weight, self.log
        array = weight.detach().numpy()

        def counting() -> None:
            nn.init.normal_(weight)
            log.append(1)
            self.level += 1
            self.steps.taken += 1

        def swapping() -> None:
            weight.data = torch.ones(8, 8)

        def caught() -> None:
            with suppress(RuntimeError):
                weight.data.normal_()
            nn.init.ones_(self.weight)

        ways: dict[str, tuple[Any, Callable[[Any], object]]] = {
            "bound method": (self.draw, lambda held: held()),
            "ordered dict": (OrderedDict(w=weight), lambda held: held["w"].data.normal_()),
            "dict keys": ({weight: 1.0}, lambda held: [nn.init.normal_(w, std=std) for w, std in held.items()]),
            "namespace": (SimpleNamespace(w=weight), lambda held: nn.init.normal_(held.w)),
            "deque": (deque([weight]), lambda held: nn.init.normal_(held[0])),
            "closure": (counting, lambda held: held()),
            "data": (lambda: weight.data.mul_(2), lambda held: held()),
            "out": (lambda: torch.add(weight, 1, out=weight), lambda held: held()),
            "foreach": (lambda: torch._foreach_zero_([weight.detach()]), lambda held: held()),
            "caught": (caught, lambda held: held()),
            "swap": (swapping, lambda held: held()),
            "replace": (lambda: setattr(self, "weight", nn.Parameter(torch.ones(8, 8))), lambda held: held()),
            "buffer": (lambda: self.count.add_(1), lambda held: held()),  # type: ignore[operator]
            "object": (Steps(weight), lambda held: nn.init.normal_(held.weight)),
            "partial": (partial(nn.init.normal_, weight), lambda held: held()),
            "numpy view": (lambda: array.fill(7.0), lambda held: held()),
        }
        self.held, self.write = ways[way]
        nn.init.normal_(weight)

    def draw(self) -> None:
        self.counts["calls"] += 1
        self.log.append(1)
        nn.init.normal_(self.weight)

    def reset_parameters(self) -> None:
        self.level += 1
        self.counts["calls"] += 1
        self.steps.taken += 1
        random.random()
        np.random.rand()
        self.write(self.held)


class Steps:
    """An object of a class of its own, with a number that initializers change."""

    def __init__(self, weight: Tensor | None = None) -> None:
        self.taken = 0
        self.weight = weight


COPIED = ("bound method", "ordered dict", "dict keys", "namespace", "deque")
SEEN = ("closure", "data", "out", "foreach", "caught", "swap", "replace", "buffer", "object", "partial", "numpy view")


@pytest.mark.parametrize("way", [*COPIED, *SEEN])
def test_the_model_and_all_generators_stay_whatever_an_initializer_reaches(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Bitwise. Fails when constrain overwrites a pretrained weight through something that no copy was made of.

    Where the copies hold it, the initializer's norm counts; else the present one.
    """
    model = nn.Sequential(nn.Linear(8, 8), Reaching(way))
    reaching = model[1]
    assert isinstance(reaching, Reaching)
    parameters = dict(model.named_parameters())
    before = {name: (x, x.detach().clone()) for name, x in [*parameters.items(), *model.named_buffers()]}
    attributes = dict(vars(reaching))
    generators = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())

    with caplog.at_level(logging.INFO):
        found = {one.name: one for one in bindings(model, LpBall(2, tau=1.0))}

    now = dict([*model.named_parameters(), *model.named_buffers()])
    for name, (x, values) in before.items():
        assert now[name] is x and torch.equal(x.detach().view(torch.int32), values.view(torch.int32)), name
    assert vars(reaching).keys() == attributes.keys()
    assert all(vars(reaching)[key] is value for key, value in attributes.items())
    assert (reaching.level, reaching.log, reaching.counts, reaching.steps.taken) == (0, [0], {"calls": 0}, 0)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), repr(np.random.get_state())) == generators[1:]
    assert found["0.weight"].source == "initializer"
    assert found["1.weight"].source == ("initializer" if way in COPIED else "present")
    assert found["1.weight"].norm == pytest.approx(8.0, rel=0.02 if way in COPIED else 0.5)
    refused = "Reaching's initializer cannot be called on a copy: it writes to the model itself" in caplog.text
    assert refused == (way in SEEN and way not in ("swap", "replace"))


def test_an_initializer_does_not_reach_the_rest_of_the_model() -> None:
    """Fails when a module's initializer draws the weights of another, which is no child of it, or changes it else."""
    other = nn.Linear(3, 3)
    weight, before = other.weight, nn.init.ones_(other.weight).detach().clone()

    def swap(x: Tensor) -> None:
        weight.data = torch.zeros(3, 3)
        other.weight = nn.Parameter(torch.zeros(3, 3))
        other.extra_state = 1  # type: ignore[assignment]
        nn.init.ones_(x)

    for initialise, drawn in ((lambda _: nn.init.zeros_(weight), 0), (swap, 1)):
        own = Own(initialise)
        assert len(drawn_norms(nn.Sequential(other, own), {own: ["weight"]})) == drawn
        assert other.weight is weight and torch.equal(weight, before) and not hasattr(other, "extra_state")


@pytest.mark.parametrize("draw", [lambda: np.random.randn(8, 8), lambda: [random.gauss() for _ in range(64)]])
def test_norms_drawn_by_other_generators_are_the_same_on_every_rank(draw: Callable[[], Any]) -> None:
    """Fails when the rank's seed of NumPy or Python decides the norm, or when constrain draws on in its sequence."""

    def initialise(x: Tensor) -> None:
        x.copy_(torch.as_tensor(draw()).reshape(8, 8))

    norms = set()
    for seed in (1, 2):
        np.random.seed(seed)
        random.seed(seed)
        module = Own(initialise)
        states = random.getstate(), repr(np.random.get_state())
        norms.add(expected_initial_norm(module, "weight"))
        assert (random.getstate(), repr(np.random.get_state())) == states
    (norm,) = norms
    assert norm == pytest.approx(8.0, rel=0.03)


def test_a_module_keeps_its_own_generators() -> None:
    """Fails when drawing moves a generator that the module holds."""

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.numpys, self.torchs, self.pythons = np.random.default_rng(0), torch.Generator(), random.Random(0)

        def reset_parameters(self) -> None:
            scale = self.pythons.random() + self.numpys.random()
            nn.init.normal_(self.weight, std=scale, generator=self.torchs)

    held = Held()
    states = held.numpys.bit_generator.state, held.torchs.get_state().tolist(), held.pythons.getstate()
    assert drawn_norms(held, {held: ["weight"]}).keys() == {(held, "weight")}
    assert (held.numpys.bit_generator.state, held.torchs.get_state().tolist(), held.pythons.getstate()) == states
