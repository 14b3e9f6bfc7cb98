"""What a pruning leaves of each parameter: the interface that masks and low-rank factors share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from sfw_dist.distributed.dtensor import copy_entries, reshard
from sfw_dist.errors import UserError


class Pruning(ABC):
    """What is left of each prunable parameter at one sparsity."""

    @property
    @abstractmethod
    def counts(self) -> Mapping[str, tuple[int, int]]:
        """For each prunable parameter its number of entries, and how many numbers are left of it."""

    @property
    @abstractmethod
    def ranks(self) -> Mapping[str, int]:
        """The rank of each weight that is described by one; empty for masks."""

    @property
    @abstractmethod
    def skipped(self) -> tuple[str, ...]:
        """The prunable parameters that the granularity does not fit; they stay whole."""

    @abstractmethod
    def changed(self) -> Iterable[str]:
        """The names of the parameters that change."""

    @abstractmethod
    def shape(self, name: str) -> torch.Size:
        """Of a prunable parameter."""

    @abstractmethod
    def pruned(self, name: str, parameter: Tensor) -> Tensor:
        """A changed parameter after pruning, as a new tensor."""

    @property
    def kept(self) -> int:
        """How many numbers are left, over all prunable parameters."""
        return sum(kept for _, kept in self.counts.values())

    @property
    def total(self) -> int:
        """The number of entries of all prunable parameters."""
        return sum(entries for entries, _ in self.counts.values())

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable entries that is removed."""
        return (self.total - self.kept) / self.total

    def pruned_parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters of ``model`` that change, by name, as new tensors; ``model`` itself does not change.

        Raises:
            UserError: ``model`` lacks one of them, or has it in another shape.
        """
        return {
            name: self.pruned(name, parameter.detach()) for name, parameter in self.changed_parameters(model).items()
        }

    @torch.no_grad()
    def apply_to(self, model: nn.Module) -> None:
        """Write the pruned parameters into ``model``: all of them, or, where that fails or is interrupted, none.

        Meanwhile it keeps a copy of what it has changed.

        Raises:
            UserError: ``model`` lacks one of them, or has it in another shape.
        """
        with all_or_nothing() as write:
            for name, parameter in self.changed_parameters(model).items():
                write(parameter, self.pruned(name, parameter))

    def changed_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of ``model`` that change, by name, themselves.

        Raises:
            UserError: ``model`` lacks one of them, or has it in another shape.
        """
        reshard(model)
        parameters = dict(model.named_parameters())
        found = {}
        for name in self.changed():
            mine, theirs = self.shape(name), parameters[name].shape if name in parameters else None
            if theirs != mine:
                have = "lacks it" if theirs is None else f"has it as {tuple(theirs)}"
                raise UserError(
                    f"this pruning is of a model whose {name} is {tuple(mine)}, and {type(model).__name__} {have}: "
                    "apply it to the model that it was made from"
                )
            found[name] = parameters[name]
        return found


@contextmanager
def all_or_nothing() -> Iterator[Callable[[Tensor, Tensor], None]]:
    """Gives a function that copies a tensor into another; if the block fails, all have their former values again.

    Example:
        >>> x = torch.zeros(2)
        >>> try:
        ...     with all_or_nothing() as write:
        ...         write(x, torch.ones(2))
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     x
        tensor([0., 0.])
    """
    written: list[tuple[Tensor, Tensor]] = []

    def write(target: Tensor, value: Tensor) -> None:
        written.append((target, target.detach().clone()))
        copy_entries(target.detach(), value)

    try:
        yield write
    except BaseException:
        for target, before in reversed(written):
            with suppress(RuntimeError):  # what cannot be written has not changed
                copy_entries(target.detach(), before)
        raise
