"""What all strategies share: the optimizer, the precision, micro-batches, and what a checkpoint holds of them."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from sfw_dist.config import Config
from sfw_dist.distributed.world import World, broadcast_buffers
from sfw_dist.errors import UserError
from sfw_dist.optim.param_groups import names_by_number
from sfw_dist.pruning.outputs import logits_of
from sfw_dist.train.checkpoint import allocate_on_cpu

_SHAPED = ("momentum_buffer", "sum_of_squares")
"""Entries of an optimizer's state that have the shape of their parameter."""


def autocast(config: Config, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the context of the forward pass for the precision in the configuration."""
    if config.train.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


class Strategy(ABC):
    """A model with its optimizer on this rank; the losses and gradients are means over the global batch.

    Every rank calls the same methods in the same order. A subclass sets ``model`` to the network that it trains,
    ``_replica`` to what is called in a forward pass of training, and ``optimizer`` to a torch optimizer.
    """

    model: nn.Module
    optimizer: Optimizer
    lockstep = False
    """Whether :meth:`forward` is collective, so that every rank must make the same number of passes."""
    _replica: nn.Module

    def __init__(self, model: nn.Module, config: Config, world: World) -> None:
        self._config, self._world = config, world
        # Taken before the model is sharded; checkpoints are compared with it.
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.parameters = sum(parameter.numel() for parameter in model.parameters())

    def warm_up(self, image_shape: tuple[int, int, int]) -> None:  # noqa: B027
        """Do what a process must do once before its first step; changes no weights or buffers; collective."""

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take one optimizer step; collective.

        Args:
            images: this rank's part of a batch, ``(batch, channels, height, width)``.
            labels: class indices ``(batch,)`` or class probabilities ``(batch, classes)``.

        Returns:
            The mean cross-entropy of this rank's part, detached.
        """
        loss = self.gradients(images, labels)
        self.optimizer.step()
        return loss

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute a step's gradients, in new tensors, without the step; arguments and loss as :meth:`train_step`."""
        self.model.train()
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self._world.device)
        for number, (inputs, targets) in enumerate(self.micro_batches(images, labels), start=1):
            with self._gradient_sync(number == self._config.train.accumulate):
                with autocast(self._config, self._world.device):
                    loss = F.cross_entropy(logits_of(self._replica(self._in_layout(inputs))), targets)
                loss = loss / self._config.train.accumulate
                loss.backward()
            total += loss.detach()
        return total

    def micro_batches(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Split a batch into ``train.accumulate`` equal micro-batches: the mean over them is that of the batch."""
        count = self._config.train.accumulate
        assert len(images) % count == 0, "check_world has refused it"
        return zip(images.chunk(count), labels.chunk(count), strict=True)

    def _gradient_sync(self, enabled: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward and backward pass that reduces gradients, or leaves that to a later one."""
        return contextlib.nullcontext()

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits with BatchNorm's running statistics, without gradients."""
        with torch.no_grad(), autocast(self._config, self._world.device):
            return logits_of(self.model(self._in_layout(images)))

    def _in_layout(self, images: Tensor) -> Tensor:
        """Convert images to the network's memory format: outputs of convolutions and gradients take over the input's.

        Loaders yield channels_last; with one channel ``contiguous()`` would keep those strides, so the view is remade.
        """
        if self._config.train.channels_last:
            return images
        return images.contiguous().flatten(1).view(images.shape)

    def before_evaluation(self) -> None:
        """Switch to evaluation mode, with the same running statistics on every rank; collective."""
        self.model.eval()
        broadcast_buffers(self.model, self._world)

    @abstractmethod
    def verify_replicas(self) -> None:
        """Raise ``RuntimeError`` if tensors that two ranks should hold alike differ; collective."""

    def weights(self) -> dict[str, Tensor]:
        """Return the whole network, parameters and buffers by name; complete on rank 0; collective."""
        return self.model.state_dict()

    # Checkpoints hold `model.NAME` and `optimizer.KEY.NAME` whatever the strategy, so that each loads any other's.

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint, whole ones or DTensors; collective."""
        # Each rank has running statistics of its own until they are broadcast, and any rank may write a tensor.
        broadcast_buffers(self.model, self._world)
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        state = self.optimizer.state_dict()
        names = names_by_number(state["param_groups"])
        for index, entries in state["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):  # SGD's momentum is None before the first step
                    tensors[f"optimizer.{key}.{names[index]}"] = value
        return tensors

    def options(self) -> list[dict[str, Any]]:
        """Return the optimizer's param groups as plain values, learning rates included."""
        unpacked = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return [g | {"constraint": g["constraint"].spec()} if "constraint" in g else g for g in unpacked]

    def allocate(self, stored: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
        """Allocate tensors for the contents of a checkpoint, which :meth:`load` then takes.

        Args:
            stored: shapes and types by name, as tensors on the meta device.
            source: the checkpoint, for messages.

        Raises:
            UserError: the checkpoint is of another model.
        """
        self._check_names(stored, source)
        return allocate_on_cpu(dict(stored))

    def _check_names(self, stored: Mapping[str, Tensor], source: object) -> None:
        wanted = {f"model.{name}": shape for name, shape in self._shapes.items()}
        # Momentum may be absent (SGD's is before the first step), but not of another shape.
        kept = {f"optimizer.{key}.{name}": shape for key in _SHAPED for name, shape in self._shapes.items()}
        wanted |= {name: shape for name, shape in kept.items() if name in stored}
        found = {name: t.shape for name, t in stored.items() if not name.startswith("optimizer.step.")}
        for name in wanted.keys() | found.keys():
            shapes = [tuple(of[name]) if name in of else "absent" for of in (wanted, found)]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"{source} is of another model ({name.removeprefix('model.')} is {shapes[1]} there, "
                    f"{shapes[0]} here): resume with the model it was made with"
                )

    def load(self, tensors: Mapping[str, Tensor], options: list[dict[str, Any]], source: object) -> None:
        """Restore what :meth:`tensors` and :meth:`options` returned, on any strategy and number of ranks; collective.

        Args:
            tensors: those of :meth:`allocate`, filled.
            options: the optimizer's groups.
            source: the checkpoint, for messages.

        Raises:
            UserError: the checkpoint is of another optimizer.
        """
        self._load_model({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        try:
            self.optimizer.load_state_dict(optimizer_state(tensors, options))
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{source} is of another optimizer ({reason}): resume with the one it was made with"
            ) from None

    def _load_model(self, state: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(state)


def optimizer_state(tensors: Mapping[str, Tensor], options: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a torch optimizer's state dict, which numbers the parameters, from tensors by name."""
    names = [name for group in options for name in group["param_names"]]
    indices = iter(range(len(names)))
    groups = [{**group, "params": [next(indices) for _ in group["param_names"]]} for group in options]
    state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(names):
        for key in ("step", *_SHAPED):
            value = tensors.get(f"optimizer.{key}.{name}")
            if value is not None:
                state.setdefault(index, {})[key] = value
    return {"state": state, "param_groups": groups}
