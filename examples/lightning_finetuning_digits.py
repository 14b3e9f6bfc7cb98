"""Fine-tune with SFW in PyTorch Lightning: a frozen backbone that joins later, and averaged weights. Then prune.

    python examples/lightning_finetuning_digits.py
    python examples/lightning_finetuning_digits.py --average swa
    python examples/lightning_finetuning_digits.py --resume runs/lightning_finetuning_digits/epoch=5.ckpt

The backbone has learnt the digits 0 to 4. Lightning's ``BackboneFinetuning`` freezes it at first, so that the optimizer
begins with the head, and adds it as further groups at epoch 3; these bring their sets, for a group without one takes
momentum-SGD steps. Averages of points of a convex set lie in the set, so the averaged network is pruned as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from digits import SPARSITIES, digits
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sfw_dist import SFW, KSparsePolytope, constrain, sweep

SPARSE = KSparsePolytope(k_frac=0.01, k_min=10, tau=5.0)


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images))
        return logits

    def groups(self, part: str) -> list[dict[str, Any]]:
        """Param groups of ``backbone`` or of ``head``, by their names in the whole network."""
        # Sets as of a new network: the backbone keeps those in which it has learnt.
        groups = constrain(self, SPARSE, unconstrained="norm_and_bias", norm="initializer")
        groups[-1]["lr"] = 0.02  # for biases, which momentum SGD trains
        named = [{**g, "params": [(name, p) for name, p in g["params"] if name.startswith(part)]} for g in groups]
        return [group for group in named if group["params"]]

    def configure_optimizers(self) -> SFW:
        return SFW(self.groups("head"), lr=0.01, rescale="none")

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss


class JoiningBackbone(BackboneFinetuning):
    """BackboneFinetuning whose groups have sets and learning rates of their own."""

    def finetune_function(self, pl_module: Digits, epoch: int, optimizer: SFW) -> None:
        if epoch >= self.unfreeze_backbone_at_epoch:  # not "==": a resumed run restores groups, and freezes again
            self.make_trainable(pl_module.backbone)
        if epoch == self.unfreeze_backbone_at_epoch:
            for group in pl_module.groups("backbone"):
                optimizer.add_param_group(group)


def learn_backbone(model: Digits, data: TensorDataset) -> None:
    """Train on the digits 0 to 4; elsewhere one would load a backbone."""
    images, labels = data.tensors
    some = TensorDataset(images[labels < 5], labels[labels < 5])
    optimizer = SFW([*model.groups("backbone"), *model.groups("head")], lr=0.01, rescale="none")
    for _ in range(4):
        for batch, numbers in DataLoader(some, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(batch), numbers).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    model.head.reset_parameters()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--join", type=int, default=3, help="epoch from which the backbone is trained")
    parser.add_argument("--average", choices=["ema", "swa", "none"], default="ema")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="runs/lightning_finetuning_digits", help="where checkpoints go")
    parser.add_argument("--resume", metavar="CHECKPOINT", help="continue from this file")
    args = parser.parse_args(arguments)

    pl.seed_everything(args.seed)
    train, test = digits()
    model = Digits()
    learn_backbone(model, train)
    averages = {
        "ema": [EMAWeightAveraging(decay=0.95)],
        "swa": [StochasticWeightAveraging(swa_lrs=0.003, swa_epoch_start=0.7, annealing_epochs=2)],
        "none": [],
    }
    saving = ModelCheckpoint(args.folder, "{epoch}", save_top_k=-1, enable_version_counter=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=args.epochs,
        gradient_clip_val=1.0,
        callbacks=[JoiningBackbone(args.join), *averages[args.average], saving],
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    # The batches are the same in each epoch, so that a resumed run equals one that was not interrupted.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed)).tolist()
    trainer.fit(model, DataLoader(train, batch_size=64, sampler=order), ckpt_path=args.resume, weights_only=True)
    for point in sweep(model, [test.tensors], SPARSITIES):
        print(f"sparsity {point.sparsity:.2f}: accuracy {point.metrics['top1']:.3f}")


if __name__ == "__main__":
    main()
