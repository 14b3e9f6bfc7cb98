"""Sums of what is measured, batch by batch, and their means over the samples of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sfw_dist.distributed.dtensor import full_tensor
from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.errors import UserError
from sfw_dist.pruning.measuring.curve import COUNTS, RECALIBRATED
from sfw_dist.pruning.outputs import logits_of

Metric = Callable[[Any, Any], Any]
"""From a batch's outputs and targets to a number, or to several by name."""


@dataclass(frozen=True)
class Means:
    """Means over ``samples``, by name."""

    values: dict[str, float]
    samples: int


class Tally(Protocol):
    """Sums over batches."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of what is summed; empty before the first batch, where that tells them."""

    @property
    def sums(self) -> Tensor:
        """Of each, then the number of samples, float64 ``(names + 1,)``."""

    def add(self, output: Any, targets: Any, size: int) -> None:
        """Add a batch of so many samples."""


class ClassificationTally:
    """Hits and cross-entropy, kept on the device in float64; nothing waits for the host.

    Args:
        device: of the model's outputs.
        checked: whether shapes and labels are checked. On a GPU that waits for each batch.
    """

    names = ("top1", "top5", "loss")

    def __init__(self, device: torch.device, *, checked: bool = False) -> None:
        self._checked = checked
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, output: Any, targets: Tensor, size: int | None = None) -> None:
        """Add a batch: logits (batch, classes), as a model returns them, and integer labels (batch,).

        Raises:
            UserError: no logits; if ``checked`` other shapes, or labels that are no classes.
        """
        logits = full_tensor(logits_of(output)).float()
        if self._checked:
            _check_labels(logits, targets)
        labels = targets.long()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best.eq(labels[:, None])
        loss = F.cross_entropy(logits, labels, reduction="sum")
        count = torch.full_like(loss, len(labels))
        self.sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, count]).double()


class MetricTally:
    """Means of a metric of the user's, each batch weighted by its samples."""

    def __init__(self, device: torch.device, metric: Metric) -> None:
        self._metric = metric
        self.names: tuple[str, ...] = ()
        self.sums = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, output: Any, targets: Any, size: int) -> None:
        """Add a batch of so many samples.

        Raises:
            UserError: the metric gives no real number, one for each sample, or other names than before.
        """
        found = self._metric(output, targets)
        if not isinstance(found, Mapping):
            name = getattr(self._metric, "__name__", "metric")
            found = {"metric" if name == "<lambda>" else name: found}
        if not self.names:
            self.names = _checked_names(found)
            self.sums = self.sums.new_zeros(len(self.names) + 1)
        if set(found) != set(self.names):
            raise UserError(
                f"metric gives {', '.join(map(str, found))} after {', '.join(self.names)}: give the same names for "
                "each batch"
            )
        values = [_number(name, found[name], self.sums) for name in self.names]
        self.sums += torch.stack([*values, torch.ones_like(self.sums[0])]) * size


def means_over_ranks(tallies: Sequence[Tally], ranks: RankGroup) -> list[Means]:
    """The means of some tallies of the same metric; collective.

    Raises:
        UserError: no rank had a batch, or ranks have measured other things.
    """
    names = _agreed_names(tallies[0].names, ranks)
    everything = torch.stack([tally.sums if tally.names else tally.sums.new_zeros(len(names) + 1) for tally in tallies])
    ranks.all_reduce(everything)
    found = []
    for *sums, samples in everything.tolist():
        if not samples:
            raise UserError("no batch to measure: the loader gave none (an iterator gives its batches once)")
        found.append(Means({name: total / samples for name, total in zip(names, sums, strict=True)}, int(samples)))
    return found


def _agreed_names(mine: tuple[str, ...], ranks: RankGroup) -> tuple[str, ...]:
    """The names that ranks with a batch have; one without may not know them."""
    if ranks.size == 1:
        return mine
    everyone: list[tuple[str, ...]] = [()] * ranks.size
    dist.all_gather_object(everyone, mine, group=ranks.group)
    known = [names for names in everyone if names]
    if len(set(known)) > 1:
        raise UserError(f"metric gives other names on some ranks ({known}): give the same ones, in one order")
    return known[0] if known else ()


def _check_labels(logits: Tensor, labels: Any) -> None:
    what = "top-1, top-5 and loss compare logits (batch, classes) with integer labels (batch,)"
    remedy = "for another task give metric=, a function of (outputs, targets)"
    if not isinstance(labels, Tensor):
        kind = "no labels" if labels is None else f"labels in a {type(labels).__name__}"
        raise UserError(f"{what}, and a batch has {kind}: give (inputs, labels) or a dictionary with labels; {remedy}")
    whole = not (labels.is_floating_point() or labels.is_complex())
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1] or not whole:
        found = f"logits {tuple(logits.shape)} and {labels.dtype} labels {tuple(labels.shape)}"
        raise UserError(f"{what}, got {found}: {remedy}")
    if labels.numel():
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= logits.shape[1]:
            wrong = low if low < 0 else high
            raise UserError(f"a label is {wrong}, and the logits are of classes 0 to {logits.shape[1] - 1}: {remedy}")


def _checked_names(found: Mapping[Any, Any]) -> tuple[str, ...]:
    for name in found:
        if not isinstance(name, str) or name in COUNTS or name.endswith(RECALIBRATED):
            raise UserError(f"metric gives a number under {name!r}: choose another name, the curve's columns have it")
    if not found:
        raise UserError("metric gives an empty dictionary: give at least one number")
    return tuple(found)


def _number(name: str, value: Any, like: Tensor) -> Tensor:
    """In float64, without a dimension."""
    try:
        number = torch.as_tensor(full_tensor(value) if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"metric gives {name} as a {type(value).__name__}: give a number") from None
    if number.numel() != 1:
        raise UserError(f"metric gives {name} of shape {tuple(number.shape)}: give one number, the mean of the batch")
    if number.is_complex():
        raise UserError(f"metric gives {name} as a complex number: give a real one, as its absolute value")
    return number.detach().to(like.device, like.dtype).reshape(())
