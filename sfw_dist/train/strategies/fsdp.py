"""Fully sharded data parallelism: each rank keeps some rows of every tensor, and gathers what a layer needs.

torch's ``fully_shard`` makes DTensors of the parameters, which SFW and SGD take as they are. With ``fsdp.replicas`` the
ranks form a grid: each row of it shards one copy of the network, and gradients are averaged over the columns too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sfw_dist.config import Config
from sfw_dist.distributed.dtensor import to_local
from sfw_dist.distributed.replicas import verify_replicas
from sfw_dist.distributed.world import World, any_rank
from sfw_dist.train.build_optimizer import build_optimizer, norm_rule
from sfw_dist.train.strategies.base import Strategy

# A module is gathered as a whole while it computes, as a fraction of the network. Larger ones are split where they can
# be; smaller ones, whose messages would be latency only, are gathered with the module around them.
_LARGEST, _SMALLEST = 1 / 8, 1 / 256
_LISTS = (nn.ModuleList, nn.ModuleDict)
_LOWERED = (nn.Linear, nn.modules.conv._ConvNd)


class FSDPStrategy(Strategy):
    """Parameters, gradients and momentum sharded over the ranks; a single process keeps them whole."""

    def __init__(
        self, model: nn.Module, config: Config, world: World, called: Collection[nn.Module] | None = None
    ) -> None:
        super().__init__(model, config, world)
        self.model = self._replica = model.to(world.device)
        self.lockstep = world.size > 1
        self._mesh: DeviceMesh | None = None
        if world.size > 1:
            self._mesh = _mesh(config.fsdp.replicas, world)
            policy = _precision(model) if config.train.precision == "bf16" else MixedPrecisionPolicy()
            for module in [*modules_to_shard(model, called), model]:
                fully_shard(module, mesh=self._mesh, mp_policy=policy)
        self.optimizer = build_optimizer(self.model, config.optimizer, norm_rule(config))

    def _gradient_sync(self, enabled: bool) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(enabled)
        return contextlib.nullcontext()

    def verify_replicas(self) -> None:
        """Raise ``RuntimeError``, on every rank, if the shards of two replicas differ; collective.

        Without replicas no two ranks hold the same tensors.
        """
        if self._mesh is None or self._config.fsdp.replicas == 1:
            return
        shards = {name: to_local(parameter) for name, parameter in self.model.named_parameters()}
        found: RuntimeError | None = None
        try:
            verify_replicas(shards, self._mesh.get_group("replicas"))
        except RuntimeError as error:
            found = error
        # Ranks that hold other shards have not seen it, and would wait for this one in the next step.
        if any_rank(found is not None, self._world):
            raise found or RuntimeError("replicas differ on other ranks: resume from the last checkpoint")

    def weights(self) -> dict[str, Tensor]:
        """Return the whole network on rank 0's host, nothing on other ranks; one tensor at a time is gathered."""
        whole: dict[str, Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self._world.main:
                whole[name] = full.cpu()
        return whole

    def allocate(self, stored: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
        """Return the model's own tensors, and DTensors for momentum, so that each rank reads only its shards."""
        self._check_names(stored, source)
        own: dict[str, Tensor] = self.model.state_dict()
        allocated: dict[str, Tensor] = {}
        for name, tensor in stored.items():
            kind, _, parameter = name.partition(".")
            if kind == "model":
                allocated[name] = own[parameter]
            elif name.startswith("optimizer.momentum_buffer."):
                like = own[name.removeprefix("optimizer.momentum_buffer.")]
                allocated[name] = torch.empty_like(like, dtype=tensor.dtype)
            else:
                allocated[name] = torch.empty_like(tensor, device="cpu")
        return allocated

    def _load_model(self, state: Mapping[str, Tensor]) -> None:
        """Does nothing: :meth:`allocate` returned the model's own tensors."""


def modules_to_shard(model: nn.Module, called: Collection[nn.Module] | None = None) -> list[nn.Module]:
    """Return the modules that are gathered on their own, inner ones before those around them.

    The rest of the model is gathered with the model.

    Args:
        model: the network.
        called: the modules that it calls. A module is gathered when it is called, and others, whose weights the module
            around them reads (as in Swin's attention), are gathered with that one. ``None``: all but those inside
            torch's own modules.
    """
    total = _entries(model)

    def within(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if _entries(child) < _SMALLEST * total:
                continue
            if _entries(child) > _LARGEST * total and _calls_its_children(child):
                yield from within(child)
            if not isinstance(child, _LISTS) and (called is None or child in called):  # lists are never called
                yield child

    return list(within(model))


def _entries(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _calls_its_children(module: nn.Module) -> bool:
    """Modules are gathered when they are called; torch's attention uses its projection's weights without calling it."""
    ours = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return ours or not type(module).__module__.startswith("torch.nn.")


def _mesh(replicas: int, world: World) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shards",))
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicas", "shards"))


def _precision(model: nn.Module) -> MixedPrecisionPolicy:
    """Gather in bf16 the weights that autocast would round to it; they are not kept until the backward pass.

    What autocast computes in float32, such as normalization, stays in float32, so that results are those of autocast
    on whole tensors. Gradients are summed in float32.
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
