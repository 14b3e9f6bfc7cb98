"""Compaction: a pruned network as a smaller one that computes the same."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from sfw_dist.deploy.factoring import factor
from sfw_dist.deploy.narrowing import Narrowing, Report, UnfollowedError
from sfw_dist.errors import UserError, named
from sfw_dist.pruning.low_rank import LowRank
from sfw_dist.pruning.modes import evaluation_mode
from sfw_dist.pruning.one_shot import prune
from sfw_dist.pruning.result import Pruning
from sfw_dist.pruning.summary import count_flops

_TOLERANCE = 1e-9
"""Relative to the largest output, in float64."""


@dataclass(frozen=True)
class Compacted:
    """A smaller network that computes what the pruned one does, and what was done.

    Attributes:
        model: a module of its own, of the same classes as the given one, in the same modes and types. ``torch.save``
            takes it whole; its state dict fits a network of the same widths.
        removed: the number of output channels that each layer lost, by the layer's name.
        ranks: the rank of each weight that became two layers, by the weight's name.
        kept_because: for each layer with dead channels that stay, or each weight of low rank that stays one layer, the
            reasons, and how many channels (or weights) stay for each.
        parameters: their number, before and after.
        flops: of one sample (:func:`count_flops`), before and after.
        max_difference: the largest difference between the outputs of the pruned network and of ``model`` on the
            example, in the network's own type.
    """

    model: nn.Module
    removed: Mapping[str, int]
    ranks: Mapping[str, int]
    kept_because: Mapping[str, Mapping[str, int]]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    max_difference: float


def compact(
    model: nn.Module,
    pruning: Pruning | float,
    example: Tensor,
    *,
    zero_bias: bool = False,
    keep: Collection[str] = (),
) -> Compacted:
    """A network that is really smaller: without the channels that pruning left dead, or with low ranks as two layers.

    Its outputs equal those of the pruned network in evaluation mode to rounding, for inputs of the example's shape and
    any batch size. That is checked: in float64, and whatever torch-pruning does not follow in a network stays as it is.

    A filter of zeros still answers with a constant, from its bias and BatchNorm. What it contributes goes to the bias
    of the layers that read it; where those pad zeros, one channel stays for all such constants. In residual sums a
    channel goes only if it is constant in the sum.

    Args:
        model: the network, pruned or not; it does not change. Recalibrate it before.
        pruning: what :func:`prune` returned, of any granularity, or a sparsity for granularity "filter". With masks,
            whole filters of zeros go, and what depends on nothing but these.
        example: ``(batch, ...)``, an input on the model's device, of the size that the network will get; its first two
            samples are used.
        zero_bias: first set bias and the following BatchNorm's γ and β of dead channels to zero, because some networks
            (depthwise convolutions behind a constant, as in MobileNet) lose little otherwise. That makes another
            network: ``max_difference`` and the checks compare with it, and you must recalibrate and measure it anew.
        keep: names of layers that keep all output channels.

    Raises:
        UserError: ``pruning`` does not fit the model; DTensors; a network that does not run in float64, or whose
            outputs are no finite tensors or change from call to call; one whose input is of integers, or that
            torch-pruning fails on (but for low rank); low rank where a module reads another one's weight, or with
            ``keep`` or ``zero_bias``; an unknown name in ``keep``.
        MissingExtraError: torch-pruning is not installed (low ranks do not need it).

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> small = compact(net, 0.5, torch.zeros(1, 8))
        >>> small.model[0], small.removed, small.parameters
        (Linear(in_features=8, out_features=3, bias=True), {'0': 3}, (68, 35))
    """
    _check(model, example, keep)
    if isinstance(pruning, LowRank) and (keep or zero_bias):
        raise UserError("keep and zero_bias are about channels, and this pruning is of low rank: leave them out")
    if not isinstance(pruning, LowRank) and not example.is_floating_point():
        raise UserError(
            f"example is of {example.dtype}: channels can be removed from networks whose input is of floating point "
            "only, because noise in place of it shows what varies; take granularity rank"
        )
    example = example[:2]
    pruned = copy.deepcopy(model)
    if isinstance(pruning, Pruning):
        pruning.apply_to(pruned)
    else:
        pruning = prune(pruned, pruning, granularity="filter")
    ranks: dict[str, int] = {}
    if isinstance(pruning, LowRank):
        small, kept = _factored(pruned, pruning, example)
        report = Report(kept={name: {reason: 1} for name, reason in kept.items()})
        ranks = {name: pruning.ranks[name] for name in pruning.changed() if name not in kept}
    else:
        small, report = _narrowed(pruned, example, dict.fromkeys(keep, "keep names it"), zero_bias)
    with evaluation_mode(pruned), evaluation_mode(small):
        pairs = zip(_outputs(small, example), _outputs(pruned, example), strict=True)
        difference = max(float((mine - its).abs().max()) for mine, its in pairs)
    return Compacted(
        model=small,
        removed=report.removed,
        ranks=ranks,
        kept_because=report.kept,
        parameters=(_parameters(pruned), _parameters(small)),
        flops=(sum(count_flops(pruned, example).values()), sum(count_flops(small, example).values())),
        max_difference=difference,
    )


def _check(model: nn.Module, example: Tensor, keep: Collection[str]) -> None:
    if not isinstance(example, Tensor) or example.ndim < 1:
        raise UserError(f"example is a {type(example).__name__}: give the network's one input, a batch, as a tensor")
    unknown = sorted(set(keep) - {name for name, _ in model.named_modules()})
    if unknown:
        raise UserError(f"keep names {named(unknown)}, and {type(model).__name__} has no such module: give its names")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise UserError(f"{name} is a DTensor: gather the weights into a model on one device, and compact that")


class _Exact:
    """Whether networks compute what a given one does, in float64.

    Args:
        model: in float64 and evaluation mode; its outputs are computed now.
        example: an input; if it is not of integers, noise of its shape is a second one.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self._inputs = [_double(example)]
        if example.is_floating_point():
            noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            self._inputs.append(noise.to(example.device))
        try:
            self._expected = self._all_outputs(model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a forward meets
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"{type(model).__name__} does not run in float64, or not on noise of the example's shape "
                f"({type(error).__name__}: {reason}): give an example that it takes, and let it compute in the type of "
                "its input"
            ) from error
        if not self._expected or not all(bool(x.isfinite().all()) for x in self._expected):
            raise UserError(f"{type(model).__name__} returns no finite tensors for the example: give another one")
        if not self.holds(model):
            raise UserError(
                f"{type(model).__name__} returns other outputs each time, in evaluation mode, too: what it computes "
                "cannot be compared; switch off what is random in it"
            )

    def holds(self, model: nn.Module) -> bool:
        """Whether the outputs of ``model``, in float64 and evaluation mode, are equal to rounding."""
        found = self._all_outputs(model)
        return len(found) == len(self._expected) and all(
            x.shape == y.shape and bool((x - y).abs().max() <= _TOLERANCE * y.abs().max())
            for x, y in zip(found, self._expected, strict=True)
        )

    def _all_outputs(self, model: nn.Module) -> list[Tensor]:
        return [output for x in self._inputs for output in _outputs(model, x)]


def _factored(pruned: nn.Module, pruning: LowRank, example: Tensor) -> tuple[nn.Module, dict[str, str]]:
    """The network with two layers for each weight of low rank, and the weights for which that is not so."""
    small = copy.deepcopy(pruned)
    with evaluation_mode(small):
        kept = factor(small, pruning, example)
    reference = copy.deepcopy(pruned).double().eval()
    for name, parameter in reference.named_parameters():
        if name not in kept and name in pruning.ranks and (pair := pruning.pair(name)) is not None:
            left, right = pair
            parameter.data = (left.double() @ right.double()).view(parameter.shape)  # not rounded, as in two layers
    exact = _Exact(reference, example)
    try:
        agrees = exact.holds(copy.deepcopy(small).double().eval())
    except (AttributeError, RuntimeError, TypeError):  # it reads a weight where there are two now
        agrees = False
    if not agrees:
        raise UserError(
            f"{type(pruned).__name__} does not compute the same with two layers for one: one of its modules reads "
            "another one's weight; take granularity filter"
        )
    return small, kept


def _narrowed(pruned: nn.Module, example: Tensor, keep: dict[str, str], zero_bias: bool) -> tuple[nn.Module, Report]:
    """The network without dead channels; with ``zero_bias``, ``pruned`` changes first."""
    base, sample = copy.deepcopy(pruned).double().eval(), _double(example)
    exact = _Exact(base, example)
    if zero_bias:
        Narrowing(base, sample, keep).zero_biases()
        pruned.load_state_dict(base.state_dict())
        exact = _Exact(base, example)
    while True:
        small = copy.deepcopy(base)
        narrowing = Narrowing(small, sample, keep)
        try:
            narrowing.run(lambda: exact.holds(small))  # noqa: B023 - called in this round
        except UnfollowedError as error:
            keep = keep | {error.layer: "without it the network computes something else: torch-pruning errs here"}
        else:
            _restore(small, pruned)
            return small, narrowing.report


def _restore(small: nn.Module, like: nn.Module) -> None:
    """Give a network the types, modes and frozen parameters of another one of the same modules."""
    modules = dict(like.named_modules())
    for name, module in small.named_modules():
        theirs = modules[name]
        module.training = theirs.training
        for key, parameter in module.named_parameters(recurse=False):
            same = theirs._parameters[key]
            if same is None:  # a bias that is new
                same = theirs._parameters["weight"]
            assert same is not None
            parameter.data = parameter.data.to(same.dtype)
            parameter.requires_grad_(same.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None and theirs._buffers[key] is not None:
                module._buffers[key] = buffer.to(theirs._buffers[key].dtype)


def _double(example: Tensor) -> Tensor:
    return example.double() if example.is_floating_point() else example


@torch.no_grad()
def _outputs(model: nn.Module, example: Tensor) -> list[Tensor]:
    return [
        output for output in tree_leaves(model(example)) if isinstance(output, Tensor) and output.is_floating_point()
    ]


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
