"""What SFW and its baselines share: param groups with sets, and a state dict of plain values."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from sfw_dist.optim.param_groups import Moved, from_plain, to_plain

_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class ConstrainedOptimizer(Optimizer):
    """An optimizer whose param groups have a ``constraint``.

    Attributes:
        options: what every param group has.
    """

    options: ClassVar[tuple[str, ...]]
    _moved: list[Moved] = []  # noqa: RUF012
    """Tensors that were brought into their sets when they were added, until the first step."""

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; what cannot be trained is refused, and not kept.

        Groups with names may stand next to groups without, as frameworks add them: those get names of their places.
        """
        if self.param_groups and isinstance(param_group, dict):
            self._name_all_or_none(param_group)
        super().add_param_group(param_group)
        try:
            self._begin(self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            raise

    def _name_all_or_none(self, added: dict[str, Any]) -> None:
        params = added.get("params", ())
        params = [params] if isinstance(params, torch.Tensor) else params if isinstance(params, set) else list(params)
        if "params" in added:
            added["params"] = params  # a generator can be read once
        named = "param_names" in added or (len(params) > 0 and all(isinstance(entry, tuple) for entry in params))
        if named == ("param_names" in self.param_groups[0]):
            return
        for number, group in enumerate([*self.param_groups, added]):
            if "param_names" not in group and not (group is added and named):
                group["param_names"] = [f"group{number}.param{j}" for j in range(len(group["params"]))]

    def _complete_groups(self) -> None:
        """Give groups that were not added by :meth:`add_param_group` the options that they lack."""
        for group in self.param_groups:
            for option in self.options:
                group.setdefault(option, self.defaults[option])

    @abstractmethod
    def _begin(self, group: dict[str, Any]) -> None:
        """Check a group that was added, and have its tensors in their sets; raise ``ValueError`` to refuse it."""

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As in torch; sets are plain values, so ``torch.load(weights_only=True)`` reads what ``torch.save`` writes."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        with self._hooks_unplugged():
            state = self._whole_state()
        for group in state["param_groups"]:
            group["constraint"] = to_plain(group["constraint"])
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def _whole_state(self) -> dict[str, Any]:
        """What is saved, but for sets, which are objects still."""
        return super().state_dict()

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch: the groups' options, sets too, become those that were saved.

        Weights that were scaled when the optimizer was built, into sets that are replaced now, are again what they
        were: a run that is resumed loads its weights before or after it builds the optimizer.

        Raises:
            ValueError: the state has other groups or shapes, or is another optimizer's. Nothing has changed then.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group in groups:
            if missing := [option for option in self.options if option not in group]:
                raise ValueError(f"the state is another optimizer's (its groups have no {missing[0]}): load its own")
            group["constraint"] = from_plain(group["constraint"])
        last = self.param_groups, self.state
        try:
            with self._hooks_unplugged():
                self._load(state_dict["state"], groups)
        except BaseException:
            self.param_groups, self.state = last
            raise
        for moved in self._moved:
            moved.undo()
        self._moved = []
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load(self, state: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
        """Load what was saved; may raise when ``param_groups`` and ``state`` are already those that were loaded."""
        super().load_state_dict({"state": state, "param_groups": groups})

    @contextmanager
    def _hooks_unplugged(self) -> Iterator[None]:
        """Torch's own methods, which run the hooks, would show them a part of the state."""
        hooks = {name: getattr(self, name) for name in _HOOKS}
        self.__dict__.update({name: OrderedDict() for name in _HOOKS})
        try:
            yield
        finally:
            self.__dict__.update(hooks)
