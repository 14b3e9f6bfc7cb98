"""Train with SFW in PyTorch Lightning, then prune to several sparsities without retraining.

    python examples/lightning_digits.py
    python examples/lightning_digits.py --devices 2 --precision bf16-mixed
    python examples/lightning_digits.py --resume runs/lightning_digits/epoch=9.ckpt

``configure_optimizers`` returns SFW; everything else is as usual. SFW's state must be saved by all ranks together, as
Lightning does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pytorch_lightning as pl
from digits import SPARSITIES, digits
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from sfw_dist import SFW, KSparsePolytope, constrain, sweep


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
        )

    def configure_optimizers(self) -> dict[str, object]:
        groups = constrain(self.net, KSparsePolytope(k_frac=0.003, k_min=10, tau=5.0), unconstrained="norm_and_bias")
        groups[-1]["lr"] = 0.05  # for normalisation layers and biases, which momentum SGD trains
        optimizer = SFW(groups, lr=0.03, rescale="none")
        schedule = CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, default=1, help="processes, each on its own CPU")
    parser.add_argument("--precision", default="32-true", help="or bf16-mixed")
    parser.add_argument("--folder", default="runs/lightning_digits", help="where checkpoints go")
    parser.add_argument("--resume", metavar="CHECKPOINT", help="continue from this file")
    args = parser.parse_args(arguments)

    pl.seed_everything(args.seed)
    train, test = digits()
    model = Digits()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        precision=args.precision,
        max_epochs=args.epochs,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(args.folder, "{epoch}", save_top_k=-1, enable_version_counter=False)],
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(train, batch_size=64 // args.devices, shuffle=True), ckpt_path=args.resume)
    for point in sweep(model.net, [test.tensors], SPARSITIES):  # on all ranks together
        if trainer.is_global_zero:
            print(f"sparsity {point.sparsity:.2f}: accuracy {point.metrics['top1']:.3f}")


if __name__ == "__main__":
    main()
