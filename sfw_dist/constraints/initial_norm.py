"""The norm that ``tau`` refers to: the expected one of the initializer that made a parameter, or the present one."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sfw_dist.distributed.dtensor import full_tensor

logger = logging.getLogger(__name__)

_SEED = 0
_MOST_DRAWS = 100  # as many as published
_ENTRIES_WANTED = 100_000
_DEVIATIONS = 10.0
_QUADRATIC = 40.0
_DEVIATIONS_OF_LARGEST = (30.0, 20.0)
_LEAST_TOLERANCE = 0.01
_ZERO = 2e-4
"""Entries of this root mean square count as zeros: layer scales begin with 1e-4 to 1e-6, some biases and tokens with
1e-6, and a set of that size would freeze them. Weights of 100,000 inputs begin with 2e-3."""
_REGISTERED = ("_parameters", "_buffers", "_modules")

NormSource = Literal["initializer", "present", "1 for zeros"]


class InitialNorm(NamedTuple):
    """A norm, and where it is from."""

    value: float
    source: NormSource


class Size(NamedTuple):
    """How large a tensor's entries are."""

    norm: float
    """L2."""
    largest: float
    """The largest absolute value; NaN for many entries, where it is not needed."""


class Spread(NamedTuple):
    """Mean of a positive quantity over draws, and deviation of its logarithm."""

    mean: float
    deviation: float

    def allows(self, present: float, deviations_below: float, deviations_above: float, quadratic: float) -> bool:
        if self.mean == 0 or present == 0:
            return self.mean == present
        distance, sigma = math.log(present / self.mean), self.deviation
        deviations = deviations_below if distance < 0 else deviations_above
        return abs(distance) <= max(_LEAST_TOLERANCE, deviations * sigma + quadratic * sigma**2)


class Draws(NamedTuple):
    """What the size of a parameter is under its module's initializer."""

    norm: Spread
    largest: Spread | None
    """Of the largest entry; ``None`` where there are too few draws to know it."""

    def allow(self, present: Size) -> bool:
        """Whether a draw may be of this size, by more than chance.

        With σ the deviation of the logarithm, norms within a factor e^±t of the mean are allowed,
        ``t = max(0.01, 10·σ + 40·σ²)``. The norm of many entries is nearly normal, and 10·σ is enough. That of few is
        not: of n entries it falls below a fraction e^-t of its mean with a probability of about e^(-n·t), and the
        second term, 20/n for normal entries, keeps that below e^-20. A difference of 1 % does not matter. Initializers
        that scale a tensor of more than 100,000 entries by one random number, or draw entries without a fourth moment,
        vary more than the deviation says.

        Of up to 1000 entries, of which there are 100 draws, the largest must be one of theirs, too. Its logarithm has
        tails that are at most exponential, on the scale of its own σ: of n uniform entries the largest falls below a
        fraction e^-s of their bound with a probability of e^(-n·s), σ is 1/n, and nothing is beyond the bound; that of
        normal and heavy-tailed entries exceeds its mean by more than z·σ with a probability below about e^(-1.3·z).
        So it may be 20·σ above the mean and 30·σ below. Of fewer than 50 entries neither says much: others may pass
        whose norm is up to 3 times the initializer's (of 36 entries) or 5 times (of 16), or as many times smaller.
        """
        if not self.norm.allows(present.norm, _DEVIATIONS, _DEVIATIONS, _QUADRATIC):
            return False
        return self.largest is None or self.largest.allows(present.largest, *_DEVIATIONS_OF_LARGEST, quadratic=0.0)


def expected_initial_norm(module: nn.Module, parameter: str) -> float:
    """``E‖W‖₂`` of a module's own initializer for one of its parameters, estimated on a copy, as :func:`drawn_norms`
    does.

    A parameter that no initializer sets counts with its present norm; zeros (a bias, say) count as 1, as published: a
    set of radius 0 would freeze the tensor.

    Example:
        >>> expected_initial_norm(nn.LayerNorm(16), "weight")
        4.0
    """
    own = module.get_parameter(parameter)
    drawn = drawn_norms(module, [parameter])
    return choose_norm(drawn.values(), own.numel(), lambda: present_size(own), "initializer").value


def choose_norm(
    drawn: Collection[Draws], entries: int, present: Callable[[], Size], rule: Literal["auto", "initializer"]
) -> InitialNorm:
    """The norm that ``tau`` refers to, by the rule that :func:`~sfw_dist.constrain` states.

    Args:
        drawn: what the initializers of the modules that have the parameter give; none: no module sets it.
        entries: of the parameter.
        present: measures the parameter; called where it matters.
        rule: ``"initializer"`` disregards the present norm where there is an initializer.
    """
    zero = _ZERO * math.sqrt(entries)
    means = [draws.norm.mean for draws in drawn]
    if rule == "auto" or not drawn:
        now = present()
        if now.norm > zero:
            means = [draws.norm.mean for draws in drawn if draws.allow(now)]
            if not means:
                return InitialNorm(now.norm, "present")
    means = [mean for mean in means if mean > zero]
    return InitialNorm(min(means), "initializer") if means else InitialNorm(1.0, "1 for zeros")


def present_size(parameter: Tensor) -> Size:
    """The size now; of a DTensor it is collective over its mesh.

    The norm is rounded, because the last bits of a sum depend on device, memory layout and number of threads, and ranks
    compare the radii.
    """
    norm, largest = _size(full_tensor(parameter))
    return Size(float(f"{norm:.9g}"), largest)


def drawn_norms(module: nn.Module, parameters: Sequence[str]) -> dict[str, Draws]:
    """The sizes of a module's own parameters over draws of its initializer, on a copy.

    The initializer is the ``reset_parameters`` of torch's layers, and of classes that inherit it (of
    ``nn.MultiheadAttention``: ``_reset_parameters``), drawn up to 100 times under a generator of its own, the same on
    every rank. Large tensors, whose norm hardly varies (its relative deviation is about ``0.45/√n``), take fewer.
    Another class's own initializer is not called: what it may write to besides its parameters, or to the model itself
    through a closure, no copy can know.

    Args:
        module: stays as it is, and so does the random state.
        parameters: names of parameters that it has itself.

    Returns:
        By name; without those that no initializer of torch's sets.
    """
    reset = _torchs_initializer(type(module))
    if reset is None or not parameters:
        return {}
    # On the CPU, where the draws are the same on every machine and one generator is all there is to restore.
    clone = _Copies().of_module(module)
    counts = {p: min(_MOST_DRAWS, math.ceil(_ENTRIES_WANTED / clone.get_parameter(p).numel())) for p in parameters}
    sizes: dict[str, list[Size]] = {name: [] for name in parameters}
    by_kurtosis: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(_SEED)
        for number in range(max(counts.values())):
            try:
                reset(clone)
            except Exception as error:  # a subclass may lack what the initializer needs
                logger.info("%s's initializer cannot be called on a copy: %s", type(module).__name__, error)
                return {}
            for name in (name for name in parameters if number < counts[name]):
                drawn = clone.get_parameter(name)
                sizes[name].append(_size(drawn))
                if number == 0:
                    by_kurtosis[name] = _deviation_by_kurtosis(drawn, sizes[name][0].norm)
    finite = (name for name in parameters if math.isfinite(sum(size.norm for size in sizes[name])))
    return {name: _summary(sizes[name], by_kurtosis[name]) for name in finite}


def _torchs_initializer(kind: type[nn.Module]) -> Callable[[nn.Module], object] | None:
    """Torch's initializer of a class, if it is that; not where a property of the class's own stands for a weight."""
    reset = getattr(kind, "reset_parameters", None) or getattr(kind, "_reset_parameters", None)
    properties = (value for base in kind.__mro__ for value in vars(base).values() if isinstance(value, property))
    if reset is None or not all(_is_torchs(function) for function in (reset, *(p.fget for p in properties))):
        return None
    return reset


def _is_torchs(function: Any) -> bool:
    return getattr(function, "__module__", "").startswith("torch.")


def _summary(sizes: Sequence[Size], by_kurtosis: float) -> Draws:
    norms, largest = zip(*sizes, strict=True)
    return Draws(_spread(norms, by_kurtosis), _spread(largest, 0.0) if not math.isnan(largest[0]) else None)


def _spread(drawn: Sequence[float], least_deviation: float) -> Spread:
    mean = sum(drawn) / len(drawn)
    if min(drawn) == 0:
        return Spread(mean, math.inf if mean else 0.0)
    observed = statistics.stdev(map(math.log, drawn)) if len(drawn) > 1 else 0.0
    return Spread(mean, max(observed, least_deviation))


def _deviation_by_kurtosis(x: Tensor, norm: float) -> float:
    """The relative deviation of the norm of independent entries, ``½·√((κ − 1)/n)``, by those of one draw.

    For large tensors, which have too few draws to show it; for small ones it is too small.
    """
    if not 0 < norm < math.inf:
        return 0.0
    fourth = float(torch.linalg.vector_norm(x.detach(), 4, dtype=torch.float64))
    kurtosis = x.numel() * (fourth / norm) ** 4
    return 0.5 * math.sqrt(max(0.0, kurtosis - 1) / x.numel())


class _Copies:
    """Modules with their children, on the CPU, with parameters, buffers and other tensors of their own.

    They are whole ones where the module's are divided between ranks; ``copy.deepcopy`` refuses such modules. Parameters
    are NaN, so that those that an initializer does not set are seen.
    """

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}

    def of_module(self, module: nn.Module) -> nn.Module:
        clone: nn.Module = object.__new__(type(module))
        self._made[id(module)] = clone
        # Registered tensors come first: attributes may name them again, and hold others that an initializer writes to.
        own = {key: {k: self._of(v) for k, v in module.__dict__[key].items()} for key in _REGISTERED}
        clone.__dict__.update(own)
        clone.__dict__.update({key: self._of(v) for key, v in module.__dict__.items() if key not in _REGISTERED})
        return clone

    def _of(self, value: Any) -> Any:
        if id(value) in self._made:
            return self._made[id(value)]
        if isinstance(value, nn.Module):
            return self.of_module(value)
        if isinstance(value, nn.Parameter):
            self._made[id(value)] = _not_set(value)
        elif isinstance(value, Tensor):
            self._made[id(value)] = _on_cpu(value)
        elif type(value) in (list, tuple):
            return type(value)(self._of(entry) for entry in value)
        elif type(value) is dict:
            return {key: self._of(entry) for key, entry in value.items()}
        return self._made.get(id(value), value)


def _not_set(parameter: Tensor) -> nn.Parameter:
    real = parameter.is_floating_point()
    fill = math.nan if real and parameter.dtype.itemsize > 1 else 0
    return nn.Parameter(torch.full(parameter.shape, fill, dtype=parameter.dtype, device="cpu"), real)


def _on_cpu(x: Tensor) -> Tensor:
    if x.is_meta:
        return torch.zeros(x.shape, dtype=x.dtype, device="cpu")
    return full_tensor(x).detach().cpu().clone()


def _size(x: Tensor) -> Size:
    x = x.detach()
    few = x.numel() * _MOST_DRAWS <= _ENTRIES_WANTED
    largest = float(torch.linalg.vector_norm(x, math.inf)) if few else math.nan
    return Size(float(torch.linalg.vector_norm(x, dtype=torch.float64)), largest)
