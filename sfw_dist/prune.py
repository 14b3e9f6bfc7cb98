"""One-shot pruning: exact masks, what they leave of each layer, and the FLOPs that remain.

Algorithm 2 of Lu et al., *Learning Pruning-Friendly Networks via Frank-Wolfe*, ICLR 2022, zeroes the given fraction
of smallest-magnitude weights, over all layers together, once, without retraining. Here the count is exact: a
threshold would remove too few where magnitudes tie, and zeros always tie.

A tensor's entries are counted in row-major order of its shape, tensors in the order of ``named_parameters``; of
equal magnitudes the first are kept. So every mask is a subset of the mask of any lower sparsity.

Whole filters, and weights of low rank (:mod:`sfw_dist.low_rank`), are what Zimmer, Spiegel, Pokutta, arXiv 2205.11921,
remove from networks trained in the sets of :mod:`sfw_dist.structured`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from functools import partial
from typing import Literal, NotRequired, TypedDict, get_args, overload

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sfw_dist.errors import UserError
from sfw_dist.filters import kept_filters
from sfw_dist.low_rank import Factors, LowRank
from sfw_dist.topk import select

Scope = Literal["weights", "all"]
MaskKind = Literal["global", "layerwise", "2:4", "filters", "filters-layerwise"]
Kind = Literal["global", "layerwise", "2:4", "filters", "filters-layerwise", "low_rank"]

_FORWARD_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (*_FORWARD_LAYERS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, eq=False)
class Masks(Mapping[str, Tensor]):
    """One bool tensor per prunable parameter, by name: its shape, on its device, True where the entry is kept.

    ``skipped`` names the parameters that a pattern (2:4, filters) does not fit; their masks keep everything.
    """

    tensors: Mapping[str, Tensor]
    skipped: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def kept(self) -> int:
        """Entries kept, over all prunable parameters."""
        return sum(_count(mask) for mask in self.values())

    @property
    def total(self) -> int:
        """Entries of all prunable parameters."""
        return sum(mask.numel() for mask in self.values())

    @property
    def sparsity(self) -> float:
        """The fraction of prunable entries that is removed."""
        return (self.total - self.kept) / self.total

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Entries, and those kept, of each parameter."""
        return {name: (mask.numel(), _count(mask)) for name, mask in self.items()}


Pruning = Masks | LowRank
"""What is left of each prunable parameter."""


class LayerRow(TypedDict):
    """One prunable parameter in `layer_table`."""

    name: str
    shape: list[int]
    parameters: int
    kept: int
    sparsity: float
    rank: NotRequired[int]
    """Of a weight of low rank; ``kept`` then counts its two factors."""


@overload
def prune(model: nn.Module, sparsity: float, *, scope: Scope = "weights", kind: MaskKind = "global") -> Masks: ...
@overload
def prune(model: nn.Module, sparsity: float, *, scope: Scope = "weights", kind: Kind) -> Pruning: ...
def prune(model: nn.Module, sparsity: float, *, scope: Scope = "weights", kind: Kind = "global") -> Pruning:
    """Prune ``model`` in place: zero the smallest entries or filters or, with kind "low_rank", lower the ranks.

    Arguments and errors as for `magnitude_masks` and `singular_factors`.
    """
    parameters = dict(model.named_parameters())
    if kind == "low_rank":
        low_rank = truncated(singular_factors(model, scope=scope), sparsity)
        with torch.no_grad():
            for name, weight in low_rank.weights().items():
                parameters[name].copy_(weight)
        return low_rank
    masks = magnitude_masks(model, sparsity, scope=scope, kind=kind)
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].masked_fill_(~mask, 0)  # a product with the mask would leave negative zeros
    return masks


def magnitude_masks(model: nn.Module, sparsity: float, *, scope: Scope = "weights", kind: MaskKind = "global") -> Masks:
    """The masks that keep the entries or filters of largest magnitude; ``model`` is not touched.

    Args:
        model: a parameter that several modules share counts once, under its first name.
        sparsity: fraction to remove, in [0, 1). Of N entries exactly ``sparsity * N`` go, rounded half up, the
            product being that of the decimal number as written (0.29 of 50 is 14.5, so 15).
        scope: "weights": the ``weight`` of every linear, convolution and transposed convolution module that holds it
            as a parameter of its own (not recomputed by a parametrization). "all": every parameter, of BatchNorm and
            biases too, as in the published code.
        kind: "global": N counts all prunable entries together. "layerwise": each parameter's by themselves.
            "2:4": of every 4 consecutive input channels the 2 largest stay, the pattern of sparse tensor cores; see
            `Masks.skipped` for what has no such layout: a number of input channels that is not a multiple of 4,
            transposed convolutions, and whatever is no layer's weight.
            "filters": the output filters of convolutions and rows of linear layers of smallest root mean square entry
            go, over all layers together. ``sparsity`` and N count filters; each layer keeps its largest one, even if
            fewer go then. Not of the last layer, whose rows are the network's outputs, nor of transposed
            convolutions. Bias and normalisation of a removed filter stay.
            "filters-layerwise": the same with N for each layer by itself.

    Raises:
        UserError: sparsity out of range, or not 0.5 with "2:4"; unknown scope or kind; nothing to prune; NaN weights.
    """
    _check_arguments(sparsity, scope, kind, get_args(MaskKind))
    parameters = _prunable_parameters(model, scope)
    for name, parameter in parameters.items():
        if parameter.isnan().any():
            raise UserError(f"{name} holds NaN, which has no magnitude: prune a checkpoint from before it diverged")
    if kind.startswith("filters"):
        return _filter_masks(model, parameters, sparsity, layerwise=kind == "filters-layerwise")
    if kind == "global":
        return Masks(_global_masks(parameters, sparsity))
    if kind == "layerwise":
        return Masks({name: _keep_largest(p, sparsity) for name, p in parameters.items()})
    fitting = {name for name, _ in _layers(model, _FORWARD_LAYERS) if parameters[name].shape[1] % 4 == 0}
    masks = {
        name: _two_of_four(p) if name in fitting else torch.ones_like(p, dtype=torch.bool)
        for name, p in parameters.items()
    }
    return Masks(masks, skipped=tuple(name for name in masks if name not in fitting))


def singular_factors(model: nn.Module, *, scope: Scope = "weights") -> Factors:
    """The decompositions that `truncated` cuts at any sparsity: computed once, with one SVD a weight.

    Weights of grouped convolutions, of which each group would be a matrix of its own, stay as they are, and so does
    what has one dimension. ``model`` is not touched.

    Raises:
        UserError: unknown scope; nothing to prune; weights that are not finite.
    """
    _check_arguments(0.0, scope, "low_rank", get_args(Kind))
    parameters = _prunable_parameters(model, scope)
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise UserError(f"{name} is not finite, so it has no rank: prune a checkpoint from before it diverged")
    return Factors(parameters, [name for name, layer in _layers(model, _LAYERS) if getattr(layer, "groups", 1) > 1])


def truncated(factors: Factors, sparsity: float) -> LowRank:
    """Ranks that save ``sparsity`` of the prunable parameters, or a little more: by how much one step in rank differs.

    Raises:
        UserError: sparsity out of range.
    """
    _check_arguments(sparsity, "all", "low_rank", get_args(Kind))
    return factors.truncated(_removed(sparsity, factors.entries))


def masked_parameters(model: nn.Module, pruning: Pruning) -> dict[str, Tensor]:
    """What `prune` would leave of the parameters that it changes, by name, as new tensors; ``model`` is not touched."""
    if isinstance(pruning, LowRank):
        return pruning.weights()
    parameters = dict(model.named_parameters())
    return {name: torch.where(mask, parameters[name].detach(), 0) for name, mask in pruning.items()}


def layer_table(model: nn.Module, pruning: Pruning) -> list[LayerRow]:
    """What is left of each prunable parameter of ``model``, in the order of ``named_parameters``."""
    parameters = dict(model.named_parameters())
    rows = [_row(name, list(parameters[name].shape), *counts) for name, counts in pruning.counts.items()]
    if isinstance(pruning, LowRank):
        return [{**row, "rank": pruning.ranks[row["name"]]} if row["name"] in pruning.ranks else row for row in rows]
    return rows


def dead_layers(pruning: Pruning) -> list[str]:
    """The parameters of which nothing is kept: a weight here cuts the network in two."""
    return [name for name, (_, kept) in pruning.counts.items() if kept == 0]


def count_flops(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Dense forward FLOPs for one sample of every linear and convolution module, by the name of its weight.

    A multiply-add is two FLOPs; biases are not counted. A module called several times counts each time, and one that
    is never called, because its owner reads its weight (as ``nn.MultiheadAttention`` does), counts 0.

    Args:
        model: runs once in evaluation mode without gradients; modes and buffers are afterwards what they were.
        example: (batch, ...), an input on the model's device, of which the first sample is used.
    """
    counter = FlopCounterMode(display=False)
    names = {module: name for name, module in _layers(model, _LAYERS)}
    flops = dict.fromkeys(names.values(), 0)

    def before(module: nn.Module, args: object) -> None:
        flops[names[module]] -= counter.get_total_flops()

    def after(module: nn.Module, args: object, output: object) -> None:
        flops[names[module]] += counter.get_total_flops()

    hooks = [module.register_forward_pre_hook(before) for module in names]
    hooks += [module.register_forward_hook(after) for module in names]
    try:
        with _evaluation_mode(model), torch.no_grad(), counter:
            model(example[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return flops


def kept_flops(flops: Mapping[str, int], pruning: Pruning) -> float:
    """FLOPs that multiply by a kept weight, or by the two factors of one: each layer's count times what is kept of it.

    Of a removed filter these are its own; that the next layer may skip its channel is not counted.
    """
    counts = pruning.counts
    return sum(count * counts[name][1] / counts[name][0] if name in counts else count for name, count in flops.items())


def parse_sparsities(text: str) -> list[float]:
    """Sparsities, ascending and distinct, of a comma list of numbers and inclusive ranges ``start:stop:step``.

    >>> parse_sparsities("0.5,0.9:0.92:0.01")
    [0.5, 0.9, 0.91, 0.92]

    Raises:
        UserError: a piece that is neither, an empty range, or a sparsity outside [0, 1).
    """
    return sorted({float(value) for piece in text.split(",") for value in _expand(piece.strip())})


def _expand(piece: str) -> list[Decimal]:
    """The values of one number or range, in decimal: floating point ends 0.9:0.99:0.01 at 0.98."""
    try:
        start, *rest = [Decimal(number) for number in piece.split(":")]
        stop, step = rest or (start, Decimal(1))
        rising = 0 <= start <= stop < 1 and 0 < step <= 1
    except (ValueError, InvalidOperation):
        raise UserError(f"bad sparsities {piece!r}: write a number or start:stop:step, as in 0.9:0.99:0.01") from None
    if not rising:
        raise UserError(f"bad sparsities {piece!r}: they lie in [0, 1) and go up, as in 0.9 or 0.9:0.99:0.01")
    count = int((stop - start) / step) + 1
    if count > 1000:
        raise UserError(f"bad sparsities {piece!r}: {count} of them, at most 1000: take a larger step")
    return [start + i * step for i in range(count)]


PAPER_SPARSITIES = tuple(parse_sparsities("0.1:0.9:0.1,0.91:0.99:0.01"))


def _check_arguments(sparsity: float, scope: str, kind: str, kinds: tuple[str, ...]) -> None:
    if not 0 <= sparsity < 1:
        remedy = "it is the fraction to remove"
        if 1 < sparsity < 100:
            remedy = f"write {sparsity / 100:g} for {sparsity:g} %"
        elif sparsity == 1:
            remedy = "1 would leave nothing"
        raise UserError(f"sparsity must be in [0, 1), got {sparsity}: {remedy}")
    for argument, value, valid in (("scope", scope, get_args(Scope)), ("kind", kind, kinds)):
        if value not in valid:
            raise UserError(f"unknown {argument} {value!r}: choose one of {', '.join(valid)}")
    if kind == "2:4" and sparsity != 0.5:
        raise UserError(f"kind 2:4 removes exactly half, got sparsity {sparsity}: set it to 0.5 or use another kind")


def _prunable_parameters(model: nn.Module, scope: Scope) -> dict[str, Tensor]:
    """Detached, in the order of ``named_parameters``."""
    weights = {name for name, _ in _layers(model, _LAYERS)}
    parameters = {
        name: parameter.detach() for name, parameter in model.named_parameters() if scope == "all" or name in weights
    }
    if not parameters:
        raise UserError(f"{type(model).__name__} has nothing to prune with scope {scope!r}: it has no such parameter")
    return parameters


def _layers(model: nn.Module, types: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the given types, with the name under which ``named_parameters`` lists their weight."""
    names: dict[object, str] = {parameter: name for name, parameter in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, types) and module.weight in names:
            yield names[module.weight], module


def _global_masks(parameters: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    # Parameters of different types meet in their common type, which holds the values of each exactly.
    flat = torch.cat([p.flatten() for p in parameters.values()])
    pieces = torch.split(_keep_largest(flat, sparsity), [p.numel() for p in parameters.values()])
    # Cloned: a view would make every saved mask carry the masks of the whole model.
    return {name: piece.view(p.shape).clone() for (name, p), piece in zip(parameters.items(), pieces, strict=True)}


def _keep_largest(x: Tensor, sparsity: float) -> Tensor:
    """Bool mask of ``x``'s shape with exactly ``round_half_up(sparsity * x.numel())`` entries False."""
    mask = torch.zeros(x.numel(), dtype=torch.bool, device=x.device)
    mask[select(x, x.numel() - _removed(sparsity, x.numel()))] = True
    return mask.view(x.shape)


def _removed(sparsity: float, n: int) -> int:
    """``round_half_up(sparsity * n)``, the product taken in decimal."""
    return int((Decimal(str(sparsity)) * n).to_integral_value(ROUND_HALF_UP))


def _filter_masks(model: nn.Module, parameters: Mapping[str, Tensor], sparsity: float, *, layerwise: bool) -> Masks:
    layers = list(dict.fromkeys(name for name, _ in _layers(model, _FORWARD_LAYERS)))
    weights = {name: parameters[name] for name in layers[:-1]}
    if not weights:
        raise UserError(
            f"{type(model).__name__} has no filters to prune: they are of convolutions and linear layers before the "
            "last, whose rows are the outputs; take kind global"
        )
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    for name, kept in kept_filters(weights, partial(_removed, sparsity), layerwise=layerwise).items():
        masks[name] &= kept.view(-1, *[1] * (masks[name].ndim - 1))
    return Masks(masks, skipped=tuple(name for name in masks if name not in weights))


def _two_of_four(weight: Tensor) -> Tensor:
    """Mask of the 2 largest of every 4 consecutive input channels; ``weight`` is (out, in, *kernel).

    Sparse tensor cores skip zeros along the dimension they sum over, whose fastest index is the input channel when
    images are channels_last: (out, *kernel, in).
    """
    magnitude = weight.abs().movedim(1, -1)
    fours = magnitude.reshape(-1, 4)
    largest = fours.sort(dim=1, descending=True, stable=True).indices[:, :2]
    mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, largest, True)
    return mask.view(magnitude.shape).movedim(-1, 1).contiguous()


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():  # one by one: a frozen BatchNorm is in evaluation mode all along
            module.training = training


def _row(name: str, shape: list[int], parameters: int, kept: int) -> LayerRow:
    return LayerRow(name=name, shape=shape, parameters=parameters, kept=kept, sparsity=(parameters - kept) / parameters)


def _count(mask: Tensor) -> int:
    return int(mask.count_nonzero())
