"""What all engines share: the optimizer, the precision, micro-batches, and what a checkpoint holds of them."""

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
from sfw_dist.train.checkpoint import on_cpu

_SHAPED = ("momentum_buffer", "sum_of_squares")
"""State of an optimizer that has the shape of its parameter."""


def autocast(config: Config, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The precision of the forward pass that the configuration asks for."""
    if config.train.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


class Engine(ABC):
    """A model with its optimizer on this rank; the losses and gradients are means over the global batch.

    Every rank calls the same methods in the same order. An engine puts into ``model`` what it trains, into
    ``_replica`` what is called in a forward pass of training, and into ``optimizer`` a torch optimizer.
    """

    model: nn.Module
    optimizer: Optimizer
    lockstep = False
    """Whether :meth:`forward` is collective, so that every rank must make the same number of passes."""
    _replica: nn.Module

    def __init__(self, model: nn.Module, config: Config, world: World) -> None:
        self._config, self._world = config, world
        # Before the engine takes the model apart: what checkpoints are compared with.
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.parameters = sum(parameter.numel() for parameter in model.parameters())

    def warm_up(self, image_shape: tuple[int, int, int]) -> None:  # noqa: B027
        """What must have happened once in a process before its first step; leaves nothing behind; collective."""

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimizer step on this rank's part of a batch; the mean cross-entropy of that part, detached."""
        loss = self.gradients(images, labels)
        self.optimizer.step()
        return loss

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """A step's gradients, in new tensors, without the step; the loss as for :meth:`train_step`."""
        self.model.train()
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self._world.device)
        for number, (part, targets) in enumerate(self.micro_batches(images, labels), start=1):
            with self._reducing(number == self._config.train.accumulate):
                with autocast(self._config, self._world.device):
                    loss = F.cross_entropy(self._replica(self._in_layout(part)), targets)
                loss = loss / self._config.train.accumulate
                loss.backward()
            total += loss.detach()
        return total

    def micro_batches(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """``train.accumulate`` equal parts, so that a mean over them is one over the batch."""
        parts = self._config.train.accumulate
        assert len(images) % parts == 0, "check_world has refused it"
        return zip(images.chunk(parts), labels.chunk(parts), strict=True)

    def _reducing(self, reducing: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a forward and backward pass: whether it reduces the gradients, or leaves that to a later one."""
        return contextlib.nullcontext()

    def forward(self, images: Tensor) -> Tensor:
        """Logits with the running statistics of BatchNorm, without gradients."""
        with torch.no_grad(), autocast(self._config, self._world.device):
            logits: Tensor = self.model(self._in_layout(images))
        return logits

    def _in_layout(self, images: Tensor) -> Tensor:
        """Images in the network's memory format: convolutions follow their input, and gradients then follow them.

        Loaders yield channels_last; with one channel ``contiguous()`` would keep those strides, so the view is remade.
        """
        if self._config.train.channels_last:
            return images
        return images.contiguous().flatten(1).view(images.shape)

    def before_evaluation(self) -> None:
        """Evaluation mode, with the same running statistics on every rank; collective."""
        self.model.eval()
        broadcast_buffers(self.model, self._world)

    @abstractmethod
    def verify_replicas(self) -> None:
        """Raise ``RuntimeError`` where what two ranks hold alike differs; collective."""

    def weights(self) -> dict[str, Tensor]:
        """The whole network, parameters and buffers by name; complete on rank 0; collective."""
        return self.model.state_dict()

    # Checkpoints: `model.NAME` and `optimizer.KEY.NAME`, whatever the engine, so that any of them takes any other's.

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, whole tensors or DTensors; collective."""
        # Between two broadcasts every rank has running statistics of its own, and any rank may write a tensor.
        broadcast_buffers(self.model, self._world)
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        state = self.optimizer.state_dict()
        names = _parameter_names(state)
        for index, entries in state["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):  # SGD's momentum is None before the first step
                    tensors[f"optimizer.{key}.{names[index]}"] = value
        return tensors

    def options(self) -> list[dict[str, Any]]:
        """The optimizer's groups as plain values, learning rates included."""
        unpacked = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return [g | {"constraint": g["constraint"].spec()} if "constraint" in g else g for g in unpacked]

    def room(self, stored: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
        """Tensors for the contents of a checkpoint, which :meth:`load` then takes.

        Args:
            stored: shapes and types by name, as tensors on the meta device.
            source: the checkpoint, for messages.

        Raises:
            UserError: the tensors are another model's.
        """
        self._check_names(stored, source)
        return on_cpu(dict(stored))

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
        """Take what :meth:`tensors` and :meth:`options` gave, on any engine at any number of ranks; collective.

        Args:
            tensors: those of :meth:`room`, filled.
            options: the optimizer's groups.
            source: the checkpoint, for messages.

        Raises:
            UserError: the state is another optimizer's.
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


def _parameter_names(state: Mapping[str, Any]) -> dict[int, str]:
    pairs = (zip(group["params"], group["param_names"], strict=True) for group in state["param_groups"])
    return {index: name for group in pairs for index, name in group}


def optimizer_state(tensors: Mapping[str, Tensor], options: list[dict[str, Any]]) -> dict[str, Any]:
    """A torch optimizer's state dict, which counts parameters, from tensors that are named."""
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
