"""What a user of the library alone does; run as a script, where torch and numpy are all there is.

python bare_script.py train    a small CNN takes some steps, is pruned and recalibrated
python bare_script.py ddp      the same as two processes with DDP, which end with equal weights
"""

from __future__ import annotations

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sfw_dist import SFW, KSparsePolytope, constrain, prune, recalibrate, reduce_to_owner, sfw_init, verify_replicas

RANKS = 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)),
    )


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Images whose class is the quarter that is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (64,), generator=generator)
    images = 0.3 * torch.randn(64, 1, 8, 8, generator=generator)
    for i, label in enumerate(labels.tolist()):
        images[i, 0, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 2
    return images, labels


def train() -> None:
    net = network()
    groups = constrain(net, KSparsePolytope(k_frac=0.1, k_min=4, tau=5.0), unconstrained="norm_and_bias")
    optimizer = SFW(groups, lr=0.3, momentum=0.9)
    losses = []
    for step in range(60):
        images, labels = data(step)
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), losses
    prune(net, 0.5)
    recalibrate(net, [data(1000)[0]])
    zeros = sum(int((p == 0).sum()) for p in net.parameters() if p.dim() > 1)
    assert zeros >= 0.5 * sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert callable(sfw_init)
    print("trained")


def rank(number: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=number, world_size=RANKS)
    net = DistributedDataParallel(network())
    optimizer = SFW(constrain(net.module, KSparsePolytope(k_frac=0.1, k_min=4, tau=5.0)), lr=0.3, momentum=0.9)
    net.register_comm_hook(optimizer, reduce_to_owner)
    for step in range(10):
        images, labels = data(2 * step + number)
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    verify_replicas(dict(net.module.named_parameters()))
    if number == 0:
        print("trained on two ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train()
    else:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(rank, (f"{folder}/rendezvous",), RANKS)
