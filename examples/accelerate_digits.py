"""Train with SFW in Hugging Face Accelerate, then prune to several sparsities without retraining.

    python examples/accelerate_digits.py
    torchrun --nproc-per-node 2 examples/accelerate_digits.py --precision bf16
    python examples/accelerate_digits.py --resume runs/accelerate_digits/epoch_9

``accelerator.prepare`` takes SFW like any optimizer. SFW's state must be saved by all processes together, as
``save_state`` is.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from digits import SPARSITIES, digits
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from sfw_dist import SFW, KSparsePolytope, constrain, sweep


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="no", help="or bf16")
    parser.add_argument("--folder", default="runs/accelerate_digits", help="where checkpoints go")
    parser.add_argument("--resume", metavar="CHECKPOINT", type=Path, help="continue from this folder")
    args = parser.parse_args(arguments)

    set_seed(args.seed)
    # The order of the data depends on seed and epoch alone, so that a resumed run equals one that was not interrupted.
    ordered = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, mixed_precision=args.precision, dataloader_config=ordered)
    train, test = digits()
    net = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
    )
    groups = constrain(net, KSparsePolytope(k_frac=0.003, k_min=10, tau=5.0), unconstrained="norm_and_bias")
    groups[-1]["lr"] = 0.05  # for normalisation layers and biases, which momentum SGD trains
    optimizer = SFW(groups, lr=0.03, rescale="none")
    loader = DataLoader(train, batch_size=64 // accelerator.num_processes, shuffle=True)
    # In steps of one process: Accelerate advances the schedule once for each process.
    schedule = CosineAnnealingLR(optimizer, args.epochs * len(loader))
    model, optimizer, loader, schedule = accelerator.prepare(net, optimizer, loader, schedule)

    start = 0
    if args.resume:
        accelerator.load_state(str(args.resume))
        start = int(args.resume.name.removeprefix("epoch_")) + 1
    for epoch in range(start, args.epochs):
        model.train()
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}, learning rate {schedule.get_last_lr()[0]:.4f}")
        accelerator.save_state(f"{args.folder}/epoch_{epoch}")

    for point in sweep(model, [test.tensors], SPARSITIES):  # on all processes together
        accelerator.print(f"sparsity {point.sparsity:.2f}: accuracy {point.metrics['top1']:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
    gc.collect()  # ends the threads of gloo's process groups now: at exit they could abort the interpreter
