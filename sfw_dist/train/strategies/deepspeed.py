"""DeepSpeed as a strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from sfw_dist.config import Config
from sfw_dist.distributed.replicas import verify_replicas
from sfw_dist.distributed.world import World, broadcast_buffers
from sfw_dist.errors import UserError
from sfw_dist.optim.deepspeed import initialize
from sfw_dist.optim.sfw import SFW
from sfw_dist.optim.sharding.zero import gather_model, gather_tensors, load_tensors
from sfw_dist.pruning.outputs import logits_of
from sfw_dist.train.build_optimizer import build_optimizer, norm_rule
from sfw_dist.train.strategies.base import Strategy, autocast


class DeepSpeedStrategy(Strategy):
    """The network on every rank; the optimizer's state sharded (stage 1), and the gradients too (stage 2).

    ``precision: bf16`` is DeepSpeed's ``torch_autocast``: float32 weights and sums of gradients, bf16 passes, as in the
    other strategies, and BatchNorm works with it.
    """

    def __init__(self, model: nn.Module, config: Config, world: World) -> None:
        super().__init__(model, config, world)
        if config.deepspeed.stage == 3:
            raise UserError("deepspeed.stage 3: write 2, or engine: fsdp, which divides the parameters too")
        self.model = model.to(world.device)
        self.optimizer = build_optimizer(self.model, config.optimizer, norm_rule(config))
        # Checkpoints hold the param groups as in other strategies, one a tensor.
        self._groups = [
            {"param_names": list(g["param_names"])}
            | ({"constraint": g["constraint"].spec()} if "constraint" in g else {})
            for g in self.optimizer.param_groups
        ]
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": config.data.batch_size // (world.size * config.train.accumulate),
            "gradient_accumulation_steps": config.train.accumulate,
            "zero_optimization": {"stage": config.deepspeed.stage},
        }
        if config.train.precision == "bf16":
            # With no modules listed, gradients are summed in float32.
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        assert isinstance(self.optimizer, SFW | SGD)
        self._engine = initialize(self.model, self.optimizer, settings)

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take one optimizer step, as :meth:`Strategy.train_step`."""
        self.model.train()
        total = torch.zeros((), device=self._world.device)
        for inputs, targets in self.micro_batches(images, labels):
            with autocast(self._config, self._world.device):
                loss = F.cross_entropy(logits_of(self._engine(self._in_layout(inputs))), targets)
            total += self._engine.backward(loss).detach()  # divided by the number of micro-batches
            self._engine.step()  # acts after the last of them
        if not self._engine.was_step_applied():  # on no rank
            raise UserError("a gradient is not finite: lower optimizer.lr")
        return total

    def verify_replicas(self) -> None:
        """Raise ``RuntimeError`` if this rank's parameters are not rank 0's; collective."""
        verify_replicas(dict(self.model.named_parameters()))

    def weights(self) -> dict[str, Tensor]:
        """Return the whole network, parameters and buffers by name; collective."""
        return gather_model(self._engine)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint, ``model.NAME`` and ``optimizer.KEY.NAME``, whole; collective."""
        broadcast_buffers(self.model, self._world)
        return gather_tensors(self._engine)

    def options(self) -> list[dict[str, Any]]:
        """Return the param groups as plain values, one a tensor as in other strategies, learning rates included."""
        joined = {name: group for group in self.optimizer.param_groups for name in group["param_names"]}
        return [
            {key: value for key, value in joined[own["param_names"][0]].items() if key != "params"} | own
            for own in self._groups
        ]

    def load(self, tensors: Mapping[str, Tensor], options: list[dict[str, Any]], source: object) -> None:
        """Restore what any strategy's :meth:`tensors` and :meth:`options` returned, at any number of ranks; collective.

        Raises:
            UserError: the checkpoint is of another optimizer.
        """
        saved = {name: group for group in options for name in group["param_names"]}
        for own in self._groups:
            for name in own["param_names"]:
                theirs = saved.get(name, {})
                if name not in saved or theirs.get("constraint") != own.get("constraint"):
                    raise UserError(
                        f"{source} is of another optimizer ({name} has the set {theirs.get('constraint')} there, "
                        f"{own.get('constraint')} here): resume with the one it was made with"
                    )
        load_tensors(self._engine, tensors)
        for group in self.optimizer.param_groups:
            theirs = saved[group["param_names"][0]]
            group.update({k: v for k, v in theirs.items() if k not in ("params", "param_names", "constraint")})
