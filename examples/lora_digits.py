"""Fine-tune LoRA adapters with SFW on a base that stays frozen, then merge them and prune without retraining.

    python examples/lora_digits.py
    python examples/lora_digits.py --int8
    python examples/lora_digits.py --resume runs/lora_digits/epoch_4

The base has learnt the digits; the adapters learn them with colours inverted. PEFT wraps the network, and SFW is given
all of its parameters: those that are frozen it leaves alone. ``--int8`` keeps the base in 8 bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from digits import SPARSITIES, digits
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from sfw_dist import SFW, KSparsePolytope, constrain, sweep


class Int8Linear(nn.Module):
    """A frozen linear layer whose weight has 8 bits an entry, and a float32 scale a row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)

    def to_linear(self) -> nn.Linear:
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[0])
        layer.weight.data, layer.bias = self.weight * self.scale, self.bias
        return layer


def optimizer_of(net: nn.Module) -> SFW:
    sparse = KSparsePolytope(k_frac=0.3, k_min=10, tau=10.0)
    # Sets as of a new network: the head has learnt already, and a resumed run has trained adapters.
    groups = constrain(net, sparse, unconstrained="norm_and_bias", norm="initializer")
    groups[-1]["lr"] = 0.02  # for biases, which momentum SGD trains
    return SFW(groups, lr=1.0)


def train_epoch(net: nn.Module, data: TensorDataset, optimizer: SFW, schedule: CosineAnnealingLR, seed: int) -> float:
    torch.manual_seed(seed)  # a resumed run shuffles like the one that it continues
    net.train()
    for images, labels in DataLoader(data, batch_size=64, shuffle=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    net.eval()
    return loss.item()


def base_network(data: TensorDataset, seed: int) -> nn.Sequential:
    """A network that has learnt the digits; elsewhere one would load it."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    )
    optimizer = optimizer_of(net)
    schedule = CosineAnnealingLR(optimizer, 8 * 22)
    for epoch in range(8):
        train_epoch(net, data, optimizer, schedule, seed + epoch)
    return net


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--int8", action="store_true", help="keep the base in 8 bits")
    parser.add_argument("--folder", default="runs/lora_digits", help="where checkpoints go")
    parser.add_argument("--resume", metavar="CHECKPOINT", type=Path, help="continue from this folder")
    args = parser.parse_args(arguments)

    train, test = digits()
    base = base_network(train, args.seed)
    inverted = [TensorDataset(-data.tensors[0], data.tensors[1]) for data in (train, test)]
    dense = [sweep(base, [data.tensors], [0])[0].metrics["top1"] for data in (test, inverted[1])]
    print(f"base: accuracy {dense[0]:.3f}, with colours inverted {dense[1]:.3f}")
    torch.manual_seed(args.seed)
    if args.resume:
        net = PeftModel.from_pretrained(base, args.resume, is_trainable=True)
    else:
        net = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=["1", "3"], modules_to_save=["5"]))
    adapted = [layer for layer in net.modules() if isinstance(getattr(layer, "base_layer", None), nn.Linear)]
    if args.int8:
        for layer in adapted:
            layer.base_layer = Int8Linear(layer.base_layer)
    optimizer = optimizer_of(net)
    schedule = CosineAnnealingLR(optimizer, args.epochs * 22)
    start = 0
    if args.resume:
        state = torch.load(args.resume / "training.pt", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = int(args.resume.name.removeprefix("epoch_")) + 1
    for epoch in range(start, args.epochs):
        loss = train_epoch(net, inverted[0], optimizer, schedule, args.seed + epoch)
        print(f"epoch {epoch}: loss {loss:.3f}, learning rate {schedule.get_last_lr()[0]:.4f}")
        folder = Path(args.folder, f"epoch_{epoch}")
        net.save_pretrained(folder)  # the adapters alone
        torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, folder / "training.pt")

    if args.int8:
        for layer in adapted:
            layer.base_layer = layer.base_layer.to_linear()
    merged = net.merge_and_unload()
    for point in sweep(merged, [inverted[1].tensors], SPARSITIES):
        print(f"sparsity {point.sparsity:.2f}: accuracy {point.metrics['top1']:.3f}")


if __name__ == "__main__":
    main()
