"""Data-parallel training: a replica on every rank, gradients all-reduced by DistributedDataParallel."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from sfw_dist import comm_hook
from sfw_dist.binding import constrain
from sfw_dist.config import Config, OptimizerConfig
from sfw_dist.constraints import Unconstrained
from sfw_dist.distributed import World, broadcast_buffers
from sfw_dist.errors import UserError
from sfw_dist.optim import SFW
from sfw_dist.replicas import verify_replicas


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """SFW or SGD over all of ``model``'s parameters, which it knows by name."""
    if config.name == "sgd":
        named = list(model.named_parameters())
        return SGD(named, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    groups = constrain(model, config.constraint.build(), unconstrained=config.unconstrained)
    for group in groups:
        if isinstance(group["constraint"], Unconstrained):
            group["lr"] = config.unconstrained_lr
    return SFW(groups, lr=config.lr, momentum=config.momentum, rescale=config.rescale, weight_decay=config.weight_decay)


def autocast(config: Config, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The precision of the forward pass that the configuration asks for."""
    if config.train.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


class DDPEngine:
    """A model with its optimizer on this rank; the losses and gradients are means over the global batch."""

    def __init__(self, model: nn.Module, config: Config, world: World) -> None:
        self._config, self._world = config, world
        memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.model = model.to(world.device, memory_format=memory_format)  # type: ignore[call-overload]
        if config.train.compile:
            self.model.compile()
        self._replica: nn.Module = self.model
        if world.size > 1:
            device_ids = [world.device] if world.device.type == "cuda" else None
            self._replica = DistributedDataParallel(self.model, device_ids=device_ids)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        hooked = config.optimizer.grads != "all_reduce" or config.optimizer.overlap
        if isinstance(self._replica, DistributedDataParallel) and hooked:
            self._replica.register_comm_hook(self.optimizer, getattr(comm_hook, config.optimizer.grads))

    def warm_up(self, image_shape: tuple[int, int, int]) -> None:
        """A forward and a backward pass that leave nothing behind; collective, before the first step of a process.

        After its first backward pass DDP lays its buckets out anew, and from three ranks on the sum of a gradient
        depends, in its last bits, on the place in the bucket. A resumed run would take its first step with another
        layout than the uninterrupted run had there.
        """
        if self._world.size == 1:
            return
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        if isinstance(self.optimizer, SFW):
            self.optimizer.overlap = False  # no step follows
        self.model.train()
        images = torch.zeros(2, *image_shape, device=self._world.device).to(memory_format=torch.channels_last)
        with autocast(self._config, self._world.device):
            self._replica(self._in_layout(images)).sum().backward()
        self.optimizer.zero_grad()
        if isinstance(self.optimizer, SFW):
            self.optimizer.overlap = self._config.optimizer.overlap
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimizer step on this rank's part of a batch; the mean cross-entropy of that part, detached."""
        self.model.train()
        with autocast(self._config, self._world.device):
            loss = F.cross_entropy(self._replica(self._in_layout(images)), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def verify_replicas(self) -> None:
        """Raise ``RuntimeError`` where this rank's parameters are not rank 0's; collective."""
        verify_replicas(dict(self.model.named_parameters()))

    def forward(self, images: Tensor) -> Tensor:
        """Logits with the running statistics of BatchNorm, without gradients."""
        with torch.no_grad(), autocast(self._config, self._world.device):
            return self.model(self._in_layout(images))

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

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: ``model.NAME`` and ``optimizer.KEY.NAME``; collective."""
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

    def load(self, tensors: dict[str, Tensor], options: list[dict[str, Any]], source: object) -> None:
        """Take what :meth:`tensors` and :meth:`options` gave, at any number of ranks.

        Raises:
            UserError: the tensors are another model's; ``source`` names them.
        """
        own = self.model.state_dict()
        saved = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        for name in own.keys() | saved.keys():
            shapes = [tuple(state[name].shape) if name in state else "absent" for state in (own, saved)]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"{source} is of another model ({name} is {shapes[1]} there, {shapes[0]} here): "
                    "resume with the model it was made with"
                )
        self.model.load_state_dict(saved)
        self.optimizer.load_state_dict(_optimizer_state(tensors, options))


def _parameter_names(state: dict[str, Any]) -> dict[int, str]:
    pairs = (zip(group["params"], group["param_names"], strict=True) for group in state["param_groups"])
    return {index: name for group in pairs for index, name in group}


def _optimizer_state(tensors: dict[str, Tensor], options: list[dict[str, Any]]) -> dict[str, Any]:
    """A torch optimizer's state dict, which counts parameters, from tensors that are named."""
    names = [name for group in options for name in group["param_names"]]
    indices = iter(range(len(names)))
    groups = [{**group, "params": [next(indices) for _ in group["param_names"]]} for group in options]
    state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(names):
        for key in ("step", "momentum_buffer"):
            value = tensors.get(f"optimizer.{key}.{name}")
            if value is not None:
                state.setdefault(index, {})[key] = value
    return {"state": state, "param_groups": groups}
