"""VGG-16 with BatchNorm and one linear head.

Simonyan, Zisserman, *Very Deep Convolutional Networks for Large-Scale Image Recognition*, ICLR 2015,
configuration D. Global average pooling in place of its large head lets it take any image size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

CONVOLUTIONS_PER_STAGE = (2, 2, 3, 3, 3)


def vgg16(channels: Sequence[int], *, num_classes: int, in_channels: int) -> nn.Sequential:
    """VGG-16; ``channels`` of its five stages, each of which ends by halving the resolution, rounded up."""
    layers: list[nn.Module] = []
    for depth, out_channels in zip(CONVOLUTIONS_PER_STAGE, channels, strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
            in_channels = out_channels
        layers.append(nn.MaxPool2d(2, ceil_mode=True))  # 28 -> 14 -> 7 -> 4 -> 2 -> 1: rounding down would end at 0
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))
    return nn.Sequential(*layers, *head)
