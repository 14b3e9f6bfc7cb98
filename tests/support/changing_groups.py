"""What scripts and frameworks do to an optimizer's groups, parameters and state between two steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sfw_dist import SFW, KSparsePolytope

SHAPES = {"a": (40, 300), "b": (7, 11), "c": (25,), "d": (64, 130)}
STEPS, CHANGE_AT = 6, 3


def parameter(name: str) -> nn.Parameter:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return nn.Parameter(0.01 * torch.randn(SHAPES[name], generator=generator))


def group(name: str, p: Tensor, lr: float = 0.05) -> dict[str, Any]:
    return {"params": [(name, p)], "constraint": KSparsePolytope(k_frac=0.1, radius=0.5), "lr": lr}


class Run:
    """An optimizer over some tensors, and equal gradients wherever it runs."""

    def __init__(self, names: str, *, frozen: str = "", **options: Any) -> None:
        self.tensors = {name: parameter(name).requires_grad_(name not in frozen) for name in names}
        self.optimizer = SFW([group(name, p) for name, p in self.tensors.items()], **options)

    def step(self, number: int) -> None:
        for name, p in self.tensors.items():
            if not p.requires_grad:
                continue
            generator = torch.Generator().manual_seed(100 * number + sum(map(ord, name)))
            p.grad = torch.randn(p.shape, generator=generator)
        self.optimizer.step()

    def train(self, change: Callable[[Run], None] | None = None) -> dict[str, Tensor]:
        for number in range(STEPS):
            if number == CHANGE_AT and change is not None:
                change(self)
            self.step(number)
        return {name: p.detach().clone() for name, p in self.tensors.items()}


def pop_the_first(run: Run) -> None:
    run.optimizer.param_groups.pop(0)
    del run.tensors["a"]


def pop_the_last(run: Run) -> None:
    run.optimizer.param_groups.pop()
    run.tensors.popitem()


def append_to_a_group(run: Run) -> None:
    run.tensors["d"] = parameter("d")
    run.optimizer.param_groups[0]["params"].append(run.tensors["d"])


def insert_a_group(run: Run) -> None:
    run.tensors["d"] = parameter("d")
    made = {**run.optimizer.param_groups[0], "params": [run.tensors["d"]], "param_names": ["d"]}
    run.optimizer.param_groups.insert(0, made)


def replace_groups_by_copies(run: Run) -> None:
    run.optimizer.param_groups = [dict(each) for each in run.optimizer.param_groups]


def clear_and_add(run: Run) -> None:
    run.optimizer.param_groups.clear()
    for name, p in run.tensors.items():
        run.optimizer.add_param_group(group(name, p))


def replace_a_parameter(run: Run) -> None:
    run.tensors["b"] = nn.Parameter(run.tensors["b"].detach().clone())
    run.optimizer.param_groups[1]["params"][0] = run.tensors["b"]


def clear_the_state(run: Run) -> None:
    run.optimizer.state.clear()


def replace_the_state(run: Run) -> None:
    run.optimizer.state = defaultdict(dict)


def delete_one_state(run: Run) -> None:
    del run.optimizer.state[run.tensors["b"]]


KEEPS_MOMENTUM = (replace_groups_by_copies, pop_the_first, pop_the_last, append_to_a_group, insert_a_group)
LOSES_ALL = (clear_the_state, replace_the_state)
LOSES_B = (replace_a_parameter, delete_one_state)


def expected(change: Callable[[Run], None]) -> dict[str, Tensor]:
    """Each tensor trained on its own by one process, with momentum from the start, or from the change on."""
    found = {}
    for name in "abcd":
        alone = Run(name)
        for number in range(STEPS):
            begins = name == "d"  # it joins with the change
            if number == CHANGE_AT and (change in LOSES_ALL or (change in LOSES_B and name == "b")):
                (p,) = alone.tensors.values()
                alone.optimizer.load_state_dict(SFW([group(name, p)]).state_dict())
            if not begins or number >= CHANGE_AT:
                alone.step(number)
        found[name] = next(iter(alone.tensors.values())).detach().clone()
    return found
