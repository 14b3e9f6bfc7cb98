"""Train with SFW under PyTorch's FSDP, which shards every tensor over the ranks, then prune without retraining.

    torchrun --nproc-per-node 2 examples/fsdp_digits.py
    torchrun --nproc-per-node 3 examples/fsdp_digits.py --resume runs/fsdp_digits/epoch_9

SFW takes the parameters that ``fully_shard`` has sharded like any optimizer, and so does ``constrain``. Checkpoints are
torch's distributed ones, which can be loaded on another number of ranks.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from digits import SPARSITIES, digits
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, DistributedSampler

from sfw_dist import SFW, KSparsePolytope, constrain, sweep


def network() -> nn.Sequential:
    """Two transformer layers; the rows of an image are the tokens."""
    layers = [nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)]
    return nn.Sequential(
        nn.Flatten(1, 2), nn.Linear(8, 64), *layers, nn.Flatten(), nn.LayerNorm(512), nn.Linear(512, 10)
    )


def whole_state(net: nn.Module, optimizer: SFW, schedule: CosineAnnealingLR) -> dict[str, Any]:
    model, steps = states.get_state_dict(net, optimizer)
    return {"model": model, "optimizer": steps, "schedule": schedule.state_dict()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--folder", default="runs/fsdp_digits", help="where checkpoints go")
    parser.add_argument("--resume", metavar="CHECKPOINT", type=Path, help="continue from this folder")
    args = parser.parse_args(arguments)

    dist.init_process_group("gloo")
    torch.manual_seed(args.seed)
    train, test = digits()
    net = network()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if args.bf16 else MixedPrecisionPolicy()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net:
        if isinstance(layer, nn.TransformerEncoderLayer):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    groups = constrain(net, KSparsePolytope(k_frac=0.02, k_min=10, tau=5.0), unconstrained="norm_and_bias")
    groups[-1]["lr"] = 0.02  # for normalisation layers and biases, which momentum SGD trains
    optimizer = SFW(groups, lr=0.003, rescale="none")
    sampler = DistributedSampler(train, seed=args.seed)
    loader = DataLoader(train, batch_size=64 // dist.get_world_size(), sampler=sampler)
    schedule = CosineAnnealingLR(optimizer, args.epochs * len(loader))

    start = 0
    if args.resume:
        state = whole_state(net, optimizer, schedule)  # loading fills these tensors, shard by shard
        dcp.load(state, checkpoint_id=args.resume)
        states.set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = int(args.resume.name.removeprefix("epoch_")) + 1
    for epoch in range(start, args.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: loss {loss.item():.3f}, learning rate {schedule.get_last_lr()[0]:.4f}")
        dcp.save(whole_state(net, optimizer, schedule), checkpoint_id=f"{args.folder}/epoch_{epoch}")

    for point in sweep(net, [test.tensors], SPARSITIES):  # on all ranks together, each with its shards
        if dist.get_rank() == 0:
            print(f"sparsity {point.sparsity:.2f}: accuracy {point.metrics['top1']:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # ends the threads of gloo's process groups now: at exit they could abort the interpreter
