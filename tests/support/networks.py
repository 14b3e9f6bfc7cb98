"""Networks as a user's function makes them, for the digits' 8×8 images of one channel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer


def swin(num_classes: int, in_channels: int, width: int = 8) -> nn.Module:
    """torchvision's, whose attention reads the weights of linear layers that it does not call."""
    net = SwinTransformer([2, 2], width, depths=[1, 1], num_heads=[1, 2], window_size=[2, 2], num_classes=num_classes)
    net.features[0][0] = nn.Conv2d(in_channels, width, 2, 2)  # type: ignore[index, operator]
    return net


def vit(num_classes: int, in_channels: int) -> nn.Module:
    """torchvision's, with torch's attention."""
    net = VisionTransformer(8, 4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=num_classes)
    net.conv_proj = nn.Conv2d(in_channels, 8, 4, 4)
    return net


class _Linear(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> object:
        logits: Tensor = self.layer(x.flatten(1))
        return logits


class Named(_Linear):
    """Returns a dictionary, as the models of transformers return one."""

    def forward(self, x: Tensor) -> object:
        return {"loss": None, "logits": super().forward(x)}


class Pair(_Linear):
    """Returns what two heads say, as networks that are distilled do."""

    def forward(self, x: Tensor) -> object:
        return super().forward(x), torch.zeros(2, 10)


class Bare(_Linear):
    """Returns nothing."""

    def forward(self, x: Tensor) -> object:
        return []


class _Outputs(NamedTuple):
    logits: object
    aux_logits: Tensor


class WithAuxiliaryHead(_Linear):
    """Returns the logits of a second head, as googlenet does."""

    def forward(self, x: Tensor) -> object:
        return _Outputs(super().forward(x), torch.zeros(2, 10))


def named(num_classes: int, in_channels: int) -> nn.Module:
    """A network whose output has names."""
    return Named(num_classes)


def tied(num_classes: int, in_channels: int) -> nn.Module:
    """A network of which two layers have one weight."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, 10), nn.Linear(10, 10), nn.Linear(10, num_classes))
    net[3].weight = net[2].weight
    return net


def startable(num_classes: int, in_channels: int, pretrained: bool = False) -> nn.Module:
    """A network that has its own weights to start from."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))
    if pretrained:
        nn.init.constant_(net[1].weight, 0.5)  # type: ignore[arg-type]
    return net
