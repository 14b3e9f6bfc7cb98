"""Train a network of timm's zoo with SFW, in a loop like timm's train.py, then prune to several sparsities.

    python examples/timm_digits.py
    python examples/timm_digits.py --model resnet10t --amp
    python examples/timm_digits.py --resume runs/timm_digits/last.pth.tar

SFW replaces train.py's ``create_optimizer_v2``. Schedule, clipping, checkpoints and resuming are timm's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from digits import SPARSITIES, digits
from timm.models import resume_checkpoint
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, dispatch_clip_grad, random_seed
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from sfw_dist import SFW, KSparsePolytope, constrain, sweep


def enlarged(images: Tensor) -> Tensor:
    return F.interpolate(images, size=32, mode="bilinear")  # the zoo's networks halve an image's side five times


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_resnet", help="any of timm.list_models()")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", action="store_true", help="mixed precision, bfloat16")
    parser.add_argument("--folder", default="runs/timm_digits", help="where checkpoints go")
    parser.add_argument("--resume", metavar="CHECKPOINT", help="continue from this file")
    args = parser.parse_args(arguments)

    random_seed(args.seed)
    train, test = digits()
    model = timm.create_model(args.model, pretrained=False, num_classes=10, in_chans=1)
    groups = constrain(model, KSparsePolytope(k_frac=0.003, k_min=10, tau=5.0), unconstrained="norm_and_bias")
    groups[-1]["lr"] = 0.05  # for normalisation layers and biases, which momentum SGD trains
    optimizer = SFW(groups, lr=0.03, rescale="none")

    start = resume_checkpoint(model, args.resume, optimizer) if args.resume else 0
    loader = DataLoader(train, batch_size=64, shuffle=True)
    schedule, epochs = create_scheduler_v2(
        optimizer, "cosine", args.epochs, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    updates = start * len(loader)
    schedule.step_update(updates)
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, optimizer, args, checkpoint_dir=args.folder, recovery_dir=args.folder)

    for epoch in range(start, epochs):
        torch.manual_seed(args.seed + epoch)  # a resumed run shuffles like the one that it continues
        model.train()
        for images, labels in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
                loss = F.cross_entropy(model(enlarged(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(model.parameters(), 1.0, mode="norm")
            optimizer.step()
            updates += 1
            schedule.step_update(updates)
        schedule.step(epoch + 1)
        print(f"epoch {epoch}: loss {loss.item():.3f}, learning rate {optimizer.param_groups[0]['lr']:.4f}")
        saver.save_checkpoint(epoch)

    images, labels = test.tensors
    for point in sweep(model, [(enlarged(images), labels)], SPARSITIES):
        print(f"sparsity {point.sparsity:.2f}: accuracy {point.metrics['top1']:.3f}")


if __name__ == "__main__":
    main()
