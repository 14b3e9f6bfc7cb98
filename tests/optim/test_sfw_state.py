"""SFW's state in one process: saved, loaded, copied, and what schedules do to it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from sfw_dist import SFW, KSparsePolytope, Unconstrained, constrain
from sfw_dist.constraints import Constraint
from tests.support.chosen_gradients import (
    SETS,
    SHAPES,
    assert_all_equal,
    mixed_groups,
    parameters,
    set_gradients,
    train,
)


def test_torchs_own_state_dicts_load() -> None:
    """Fails when state that torch.distributed.checkpoint keys by name is looked up by number, and not found."""
    models = [nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)) for _ in range(2)]
    first, second = (SFW(constrain(model, KSparsePolytope(k=4, tau=15.0)), lr=0.1) for model in models)
    train(first)
    set_optimizer_state_dict(models[1], second, get_optimizer_state_dict(models[0], first))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert second.state[q]["step"] == 10
        assert torch.equal(first.state[p]["momentum_buffer"], second.state[q]["momentum_buffer"])


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file that may hold no code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(dtype: torch.dtype, momentum: float) -> None:
    """torch's own load_state_dict would cast the float32 momentum of a bf16 parameter to bf16."""
    uninterrupted = train(SFW(mixed_groups(parameters(dtype)), lr=0.1, momentum=momentum), range(20))

    stopped = SFW(mixed_groups(parameters(dtype)), lr=0.1, momentum=momentum)
    halfway = train(stopped, range(10))
    state = saved_and_loaded(stopped.state_dict())
    resumed = SFW(mixed_groups([nn.Parameter(x.clone()) for x in halfway]), lr=7.0, momentum=momentum)
    resumed.load_state_dict(state)
    assert_all_equal(train(resumed, range(10, 20)), uninterrupted)


def test_a_loaded_state_is_a_copy() -> None:
    """Two optimizers that share a momentum tensor would both add to it."""
    optimizer = SFW(mixed_groups(parameters()))
    train(optimizer)
    twin = SFW(mixed_groups([nn.Parameter(p.detach().clone()) for g in optimizer.param_groups for p in g["params"]]))
    twin.load_state_dict(optimizer.state_dict())
    continued = train(twin, range(10, 12))
    assert_all_equal(train(optimizer, range(10, 12)), continued)


def test_a_state_brings_its_constraint() -> None:
    """As in torch: the groups' options become those that were saved."""
    wide = KSparsePolytope(k=9, radius=50.0)
    saved = SFW([{"params": parameters(), "constraint": wide}], lr=0.1)
    loading = SFW([{"params": parameters(), "constraint": SETS["l2"]}], lr=0.2)
    loading.load_state_dict(saved_and_loaded(saved.state_dict()))
    assert loading.param_groups[0]["constraint"] == wide
    assert loading.param_groups[0]["lr"] == 0.1
    start = [nn.Parameter(p.detach().clone()) for p in loading.param_groups[0]["params"]]
    same = SFW([{"params": start, "constraint": wide}], lr=0.1)
    assert_all_equal(train(loading), train(same))


def keys(state: dict[str, Any]) -> Any:
    return {i: sorted(entries) for i, entries in state["state"].items()}, [sorted(g) for g in state["param_groups"]]


def test_a_fresh_state_has_the_keys_of_later_ones() -> None:
    """Distributed checkpoints are loaded into the fresh optimizer's tensors: what is not there is not read."""
    optimizer = SFW(mixed_groups(parameters()))
    fresh = keys(optimizer.state_dict())
    train(optimizer)
    assert keys(optimizer.state_dict()) == fresh
    assert fresh[0] == {i: ["momentum_buffer", "step"] for i in range(3)}


def test_a_state_of_another_shape_is_refused_whole() -> None:
    """Momentum of another shape would be broadcast. A refused state must leave the optimizer as it was."""
    shapes = [*SHAPES[:2], (18,)]
    other = SFW(mixed_groups(parameters(shapes=shapes)), lr=0.5)
    optimizer, untouched = SFW(mixed_groups(parameters())), SFW(mixed_groups(parameters()))
    train(optimizer), train(untouched)
    with pytest.raises(ValueError, match=r"momentum_buffer of group2\.param0 has shape \(18,\)"):
        optimizer.load_state_dict(other.state_dict())
    assert_all_equal(train(optimizer), train(untouched))


def test_a_state_of_other_groups_is_refused() -> None:
    other = SFW([{"params": parameters(), "constraint": SETS["l2"]}])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        SFW(mixed_groups(parameters())).load_state_dict(other.state_dict())


def test_a_group_added_later_keeps_the_momentum_of_the_others() -> None:
    """Fine-tuning adds layers in the middle of a run."""
    old, alone, new = parameters(), parameters(), parameters(shapes=[(6, 5)])[0]
    optimizer, other = SFW(mixed_groups(old), lr=0.1), SFW(mixed_groups(alone), lr=0.1)
    train(optimizer), train(other)
    optimizer.add_param_group({"params": [new], "constraint": KSparsePolytope(k=3, radius=0.01)})
    assert KSparsePolytope(k=3, radius=0.01).gauge(new) <= 1 + 1e-6
    start = new.detach().clone()
    for step in range(10, 15):
        set_gradients([new], step)
        set_gradients(old, step)
        set_gradients(alone, step)
        optimizer.step()
        other.step()
    assert_all_equal([p.detach() for p in old], [p.detach() for p in alone])
    assert not torch.equal(new, start)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_model_and_optimizer_trains_on(duplicate: Callable[[Any], Any]) -> None:
    """torch's own pickling keeps groups and state only; the copy must follow the original, and not move it."""
    optimizer = SFW(mixed_groups(parameters()))
    train(optimizer)
    twin = duplicate(optimizer)
    assert twin.statistics() == optimizer.statistics()
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    on = range(10, 15)
    continued = train(twin, on)
    assert_all_equal([p.detach() for group in optimizer.param_groups for p in group["params"]], before)
    assert_all_equal(train(optimizer, on), continued)
    twin.param_groups[0]["lr"] = 1e6
    train(twin, range(1))
    assert next(iter(twin.statistics().values())).gamma == 1.0


def test_a_momentum_that_a_scheduler_raises_from_zero_starts_with_the_gradient() -> None:
    """OneCycleLR cycles the momentum by default; a missing buffer was a KeyError in the middle of training."""
    p = torch.nn.Parameter(torch.zeros(30))
    optimizer = SFW([{"params": [p], "constraint": KSparsePolytope(k=3, radius=1.0)}], lr=0.1, momentum=0.0)
    p.grad = torch.arange(30.0)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], p.grad)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("constraint", [KSparsePolytope(k=3, radius=1.0), Unconstrained()], ids=repr)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_momentum_that_a_scheduler_took_away_starts_anew(resumed: bool, constraint: Constraint, fused: bool) -> None:
    """The momentum of long ago came back, or not, as the run had been resumed in between or not."""
    p = torch.nn.Parameter(torch.zeros(30))
    optimizer = SFW([{"params": [p], "constraint": constraint}], lr=0.1, momentum=0.9, fused=fused)
    before = keys(optimizer.state_dict())
    for momentum, sign in ((0.9, 1.0), (0.9, 1.0), (0.0, 1.0), (0.0, 1.0), (0.9, -1.0)):
        optimizer.param_groups[0]["momentum"] = momentum
        p.grad = sign * torch.arange(30.0)
        if resumed:
            state = saved_and_loaded(optimizer.state_dict())
            optimizer = SFW([{"params": [p], "constraint": constraint}], lr=0.1, momentum=0.9, fused=fused)
            optimizer.load_state_dict(state)
        optimizer.step()
        assert resumed or keys(optimizer.state_dict()) == before
    assert torch.equal(optimizer.state[p]["momentum_buffer"], p.grad)
    optimizer.step()
    expected = p.grad * (1.9 if constraint == Unconstrained() else 1.0)
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], expected)


def test_the_state_of_another_optimizer_is_refused_in_one_line() -> None:
    p = torch.nn.Parameter(torch.zeros(30))
    optimizer = SFW([{"params": [p], "constraint": KSparsePolytope(k=3, radius=1.0)}])
    with pytest.raises(ValueError, match="another optimizer's") as raised:
        optimizer.load_state_dict(torch.optim.SGD([p], lr=0.1).state_dict())
    assert "\n" not in str(raised.value)
