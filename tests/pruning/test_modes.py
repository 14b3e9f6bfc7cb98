"""Training and evaluation mode, changed for a while."""

from __future__ import annotations

import pytest
from torch import nn

from sfw_dist.pruning.modes import evaluation_mode


def test_each_module_gets_its_own_mode_back_even_after_an_error() -> None:
    """A frozen layer trains afterwards, or a network that failed once evaluates for ever."""
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)), nn.Linear(2, 2))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="inside"), evaluation_mode(model, except_for=[model[1]]):
        assert [module.training for module in model.modules()] == [False, False, True, False, False]
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == modes
