"""A model's weights and statistics, overwritten for a while and then restored to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sfw_dist.distributed.dtensor import copy_entries, reshard
from sfw_dist.pruning.result import Pruning


class Overwritable:
    """Some tensors of a model, with a copy of each as it was."""

    def __init__(self, model: nn.Module, weights: Iterable[str], buffers: Iterable[str]) -> None:
        reshard(model)
        parameters = dict(model.named_parameters())
        self._model = model
        self._weights = {name: _with_copy(parameters[name]) for name in weights}
        self._buffers = {name: _with_copy(model.get_buffer(name)) for name in buffers}

    def prune(self, pruning: Pruning) -> None:
        """Give the weights what a pruning makes of them as they were, whatever was written before."""
        reshard(self._model)
        changed = set(pruning.changed())
        for name, (tensor, own) in self._weights.items():
            copy_entries(tensor, pruning.pruned(name, own) if name in changed else own)
        torch.clear_autocast_cache()  # else a surrounding autocast goes on with the weights that it has converted

    def set_buffers(self, values: Mapping[str, Tensor]) -> None:
        """Give the buffers these values, by name; those that are left out are as they were."""
        for name, (tensor, own) in self._buffers.items():
            copy_entries(tensor, values.get(name, own))

    def restore(self) -> None:
        """Make all as it was."""
        reshard(self._model)
        for tensor, own in (*self._weights.values(), *self._buffers.values()):
            copy_entries(tensor, own)
        torch.clear_autocast_cache()


@contextmanager
def overwriting(model: nn.Module, prunings: Sequence[Pruning], buffers: Iterable[str] = ()) -> Iterator[Overwritable]:
    """Gives what can be overwritten inside the ``with`` block; afterwards all is as before, whatever happens there.

    The weights themselves are written, as by ``prune``, so that compiled, wrapped and sharded models, tied weights and
    modules that hold a weight under a second name all see them.

    Args:
        model: the network. Meanwhile there is a copy of the weights and buffers that may change.
        prunings: of this network.
        buffers: names of buffers that may change, too.

    Raises:
        UserError: a pruning is of another network.

    Example:
        >>> from sfw_dist.pruning import Pruner
        >>> net = nn.Linear(2, 1, bias=False)
        >>> net.weight.data = torch.tensor([[1.0, 2.0]])
        >>> half = Pruner(net).at(0.5)
        >>> with overwriting(net, [half]) as tensors:
        ...     tensors.prune(half)
        ...     print(net.weight.tolist())
        [[0.0, 2.0]]
        >>> net.weight.tolist()
        [[1.0, 2.0]]
    """
    names = {name: None for pruning in prunings for name in pruning.changed_parameters(model)}
    tensors = Overwritable(model, names, buffers)
    try:
        yield tensors
    finally:
        tensors.restore()


def _with_copy(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """What to write to, and a copy. A backward pass that began before does not notice: it finds what it has saved."""
    return tensor.data, tensor.detach().clone()
