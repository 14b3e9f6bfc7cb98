"""Fully sharded data parallelism: each rank keeps a part of every tensor's rows, and gathers what a layer needs.

torch's ``fully_shard`` makes DTensors of the parameters, which SFW and SGD take as they are. With ``fsdp.replicas`` the
ranks form a grid: each row of it divides one copy of the network, and gradients are averaged over the columns too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sfw_dist.config import Config
from sfw_dist.distributed.replicas import verify_replicas
from sfw_dist.distributed.world import World, any_rank
from sfw_dist.train.build_optimizer import build_optimizer
from sfw_dist.train.strategies.base import Engine

# A part of the network is gathered as a whole while it computes. Larger ones are taken apart where they can be, and
# smaller ones, whose messages would be all latency, are gathered with what is around them.
_LARGEST, _SMALLEST = 1 / 8, 1 / 256
_LISTS = (nn.ModuleList, nn.ModuleDict)
_LOWERED = (nn.Linear, nn.modules.conv._ConvNd)


class FSDPEngine(Engine):
    """Parameters, gradients and momentum divided between the ranks. One process alone divides nothing."""

    def __init__(self, model: nn.Module, config: Config, world: World) -> None:
        super().__init__(model, config, world)
        self.model = self._replica = model.to(world.device)
        self.lockstep = world.size > 1
        self._mesh: DeviceMesh | None = None
        if world.size > 1:
            self._mesh = _mesh(config.fsdp.replicas, world)
            policy = _precision(model) if config.train.precision == "bf16" else MixedPrecisionPolicy()
            for part in [*parts(model), model]:
                fully_shard(part, mesh=self._mesh, mp_policy=policy)
        self.optimizer = build_optimizer(self.model, config.optimizer)

    def _reducing(self, reducing: bool) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(reducing)
        return contextlib.nullcontext()

    def verify_replicas(self) -> None:
        """Raise ``RuntimeError``, on every rank, where the shards of two replicas differ; collective.

        Without replicas no two ranks hold the same.
        """
        if self._mesh is None or self._config.fsdp.replicas == 1:
            return
        shards = {name: _local(parameter) for name, parameter in self.model.named_parameters()}
        found: RuntimeError | None = None
        try:
            verify_replicas(shards, self._mesh.get_group("replicas"))
        except RuntimeError as error:
            found = error
        # The ranks with other shards have not seen it, and would wait for this one in the next step.
        if any_rank(found is not None, self._world):
            raise found or RuntimeError("replicas differ on other ranks: go on from the last checkpoint")

    def weights(self) -> dict[str, Tensor]:
        """The whole network, on rank 0's host only; one tensor at a time is whole on the other ranks."""
        whole: dict[str, Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self._world.main:
                whole[name] = full.cpu()
        return whole

    def room(self, stored: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
        """The engine's own tensors, so that each rank reads its shards alone."""
        self._check_names(stored, source)
        own: dict[str, Tensor] = self.model.state_dict()
        room: dict[str, Tensor] = {}
        for name, tensor in stored.items():
            kind, _, parameter = name.partition(".")
            if kind == "model":
                room[name] = own[parameter]
            elif name.startswith("optimizer.momentum_buffer."):
                like = own[name.removeprefix("optimizer.momentum_buffer.")]
                room[name] = torch.empty_like(like, dtype=tensor.dtype)
            else:
                room[name] = torch.empty_like(tensor, device="cpu")
        return room

    def _load_model(self, state: Mapping[str, Tensor]) -> None:
        """Nothing: :meth:`room` gave the model's own tensors."""


def parts(model: nn.Module) -> list[nn.Module]:
    """What is gathered on its own, inner parts before those around them; the rest of the model is gathered with it."""
    total = _entries(model)

    def within(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if _entries(child) < _SMALLEST * total:
                continue
            if _entries(child) > _LARGEST * total and _calls_its_children(child):
                yield from within(child)
            if not isinstance(child, _LISTS):  # they are never called
                yield child

    return list(within(model))


def _entries(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _calls_its_children(module: nn.Module) -> bool:
    """Parts are gathered when they are called. torch's attention, for one, takes its projection's weights itself."""
    ours = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return ours or not type(module).__module__.startswith("torch.nn.")


def _mesh(replicas: int, world: World) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shards",))
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicas", "shards"))


def _precision(model: nn.Module) -> MixedPrecisionPolicy:
    """Weights that autocast would round to bf16 travel so, and are not kept from the forward to the backward pass.

    What autocast computes in float32, normalisation for one, stays in it, so that results are those of autocast on
    whole tensors. Gradients are summed in float32.
    """
    if not hasattr(MixedPrecisionPolicy, "param_dtype_override_fn"):  # before torch 2.15
        return MixedPrecisionPolicy()
    lowered = {p for module in model.modules() if isinstance(module, _LOWERED) for p in module.parameters()}
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
        param_dtype_override_fn=lambda parameter: None if parameter in lowered else torch.float32,
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
