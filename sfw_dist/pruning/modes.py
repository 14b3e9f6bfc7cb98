"""Training and evaluation mode of a model's modules, changed for a while and then restored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module, *, except_for: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Evaluation mode inside the ``with`` block; afterwards each module has the mode that it had before.

    Args:
        model: modules are restored one by one, because a frozen BatchNorm, say, is in evaluation mode all the time.
        except_for: modules of ``model`` that are in training mode meanwhile; their submodules are not.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3))
        >>> with evaluation_mode(net, except_for=[net[1]]):
        ...     print([module.training for module in net])
        [False, True]
        >>> [module.training for module in net]
        [True, True]
    """
    modes = {module: module.training for module in model.modules()}
    training = set(except_for)
    try:
        for module in modes:
            module.training = module in training
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
