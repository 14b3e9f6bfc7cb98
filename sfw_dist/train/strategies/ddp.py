"""Data-parallel training: a replica on every rank, gradients all-reduced by DistributedDataParallel."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sfw_dist.config import Config
from sfw_dist.distributed.replicas import verify_replicas
from sfw_dist.distributed.world import World
from sfw_dist.optim.comm_hooks import reduce_to_owner, reduce_to_owner_bf16
from sfw_dist.pruning.outputs import logits_of
from sfw_dist.train.build_optimizer import build_optimizer, norm_rule
from sfw_dist.train.strategies.base import Strategy, autocast

_HOOKS = {"all_reduce": None, "reduce_to_owner": reduce_to_owner, "reduce_to_owner_bf16": reduce_to_owner_bf16}
"""Communication hooks by ``optimizer.grads``."""


class DDPStrategy(Strategy):
    """The whole network on every rank."""

    def __init__(self, model: nn.Module, config: Config, world: World) -> None:
        super().__init__(model, config, world)
        memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.model = model.to(world.device, memory_format=memory_format)  # type: ignore[call-overload]
        if config.train.compile:
            self.model.compile()
        self._replica = self.model
        if world.size > 1:
            device_ids = [world.device] if world.device.type == "cuda" else None
            self._replica = DistributedDataParallel(self.model, device_ids=device_ids)
        self.optimizer = build_optimizer(self.model, config.optimizer, norm_rule(config))
        hook = _HOOKS[config.optimizer.grads]
        if isinstance(self._replica, DistributedDataParallel) and hook is not None:
            self._replica.register_comm_hook(self.optimizer, hook)

    def warm_up(self, image_shape: tuple[int, int, int]) -> None:
        """Run a forward and a backward pass, and restore gradients and buffers; collective, before the first step.

        After its first backward pass DDP rearranges its buckets, and from three ranks on the last bits of a summed
        gradient depend on its place in the bucket. Without the warm-up, a resumed run would take its first step with
        another arrangement than the uninterrupted run had there.
        """
        if self._world.size == 1:
            return
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        self.model.train()
        images = torch.zeros(2, *image_shape, device=self._world.device).to(memory_format=torch.channels_last)
        with autocast(self._config, self._world.device):
            logits_of(self._replica(self._in_layout(images))).sum().backward()
        self.optimizer.zero_grad()
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _gradient_sync(self, enabled: bool) -> contextlib.AbstractContextManager[Any]:
        if enabled or not isinstance(self._replica, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._replica.no_sync()

    def verify_replicas(self) -> None:
        """Raise ``RuntimeError`` if this rank's parameters are not rank 0's; collective."""
        verify_replicas(dict(self.model.named_parameters()))
