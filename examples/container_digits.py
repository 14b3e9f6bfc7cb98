"""Train with SFW and AdamW in one container, as large training programs hold them, then prune without retraining.

    torchrun --nproc-per-node 2 examples/container_digits.py
    torchrun --nproc-per-node 3 examples/container_digits.py --resume runs/container_digits/step_220

The model lies in two parts, as stages of a pipeline do, sharded by FSDP. Each part has an SFW for its matrices and an
AdamW for the rest; the container steps them all, and its state is flat, by parameter name, for distributed checkpoints.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from digits import SPARSITIES, digits
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sfw_dist import SFW, KSparsePolytope, constrain, sweep

BATCH = 60
FLAT = states.StateDictOptions(flatten_optimizer_state_dict=True)


def network() -> tuple[nn.Sequential, nn.Sequential]:
    """Two transformer layers in two parts; the rows of an image are the tokens."""
    layers = [nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)]
    names = ("flatten", "embed", "layer_0", "layer_1", "join", "norm", "output")
    modules = (nn.Flatten(1, 2), nn.Linear(8, 64), *layers, nn.Flatten(), nn.LayerNorm(512), nn.Linear(512, 10))
    parts = (nn.Sequential(), nn.Sequential())
    for number, (name, module) in enumerate(zip(names, modules, strict=True)):
        parts[number > 2].add_module(name, module)  # names differ between the parts: one state holds both
    return parts


class Optimizers(Optimizer, Stateful):
    """Several optimizers as one; ``state_dict`` is that of all, and resharded when it is loaded elsewhere."""

    def __init__(self, parts: Sequence[nn.Module], lr: float) -> None:
        self.parts, self.optimizers = parts, []
        everything = []
        for part in parts:
            groups = constrain(part, KSparsePolytope(k_frac=0.02, k_min=10, tau=5.0), unconstrained="norm_and_bias")
            rest = groups.pop()["params"]
            self.optimizers.append((part, SFW(groups, lr=lr, rescale="none")))
            self.optimizers.append((part, AdamW(rest, lr=lr)))
            everything += [p for p in part.parameters() if p.requires_grad]
        super().__init__(everything, {})  # for hooks, and for whoever asks for the groups

    def __iter__(self) -> Iterator[Optimizer]:
        return iter(optimizer for _, optimizer in self.optimizers)

    def step(self, closure: None = None) -> None:
        for optimizer in self:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        found = [states.get_optimizer_state_dict(part, o, options=FLAT) for part, o in self.optimizers]
        return {name: value for state in found for name, value in state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, optimizer in self.optimizers:
            states.set_optimizer_state_dict(part, optimizer, state_dict, options=FLAT)


class Schedules(Stateful):
    """One factor for all optimizers: a warm-up, then a line to zero."""

    def __init__(self, optimizers: Optimizers, steps: int) -> None:
        warm_up = steps // 10
        self.schedules = [
            LambdaLR(o, lambda step: min((step + 1) / (warm_up + 1), (steps - step) / (steps - warm_up)))
            for o in optimizers
        ]

    def step(self) -> None:
        for schedule in self.schedules:
            schedule.step()

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.schedules[0].last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for schedule in self.schedules:
            schedule.last_epoch = state_dict["last_epoch"] - 1
            schedule.step()


class Model(Stateful):
    """The weights of all parts under their own names."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self.parts = parts

    def __call__(self, images: Tensor) -> Tensor:
        for part in self.parts:
            images = part(images)
        return images

    def state_dict(self) -> dict[str, Any]:
        return {name: value for part in self.parts for name, value in states.get_model_state_dict(part).items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part in self.parts:
            own = {name: state_dict[name] for name in states.get_model_state_dict(part)}
            states.set_model_state_dict(part, own)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=330)
    parser.add_argument("--interval", type=int, default=110, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="runs/container_digits", help="where checkpoints go")
    parser.add_argument("--resume", metavar="CHECKPOINT", type=Path, help="continue from this folder")
    args = parser.parse_args(arguments)

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)
    train, test = digits()
    parts = network()
    mesh = dist.init_device_mesh("cpu", (ranks,))
    for part in parts:
        for module in part:
            if isinstance(module, nn.TransformerEncoderLayer):
                fully_shard(module, mesh=mesh)
        fully_shard(part, mesh=mesh)
    model = Model(parts)
    optimizers = Optimizers(parts, lr=0.003)
    schedules = Schedules(optimizers, args.steps)
    start = 0
    if args.resume:
        dcp.load({"model": model, "optimizer": optimizers, "schedule": schedules}, checkpoint_id=args.resume)
        start = int(args.resume.name.removeprefix("step_"))

    images, labels = train.tensors
    for step in range(start, args.steps):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed + step))
        mine = order[:BATCH][rank::ranks]
        loss = F.cross_entropy(model(images[mine]), labels[mine])
        optimizers.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for part in parts for p in part.parameters()], 1.0)
        optimizers.step()
        schedules.step()
        done = step + 1
        if done % args.interval == 0 or done == args.steps:
            if rank == 0:
                print(
                    f"step {done}: loss {loss.item():.3f}, learning rate {schedules.schedules[0].get_last_lr()[0]:.4f}"
                )
            state = {"model": model, "optimizer": optimizers, "schedule": schedules}
            dcp.save(state, checkpoint_id=f"{args.folder}/step_{done}")

    for point in sweep(
        nn.Sequential(*parts), [test.tensors], SPARSITIES
    ):  # on all ranks together, each with its shards
        if rank == 0:
            print(f"sparsity {point.sparsity:.2f}: accuracy {point.metrics['top1']:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # ends the threads of gloo's process groups now: at exit they could abort the interpreter
