"""Small convolutional networks that train in seconds to minutes on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def cnn3(channels: Sequence[int], *, num_classes: int, in_channels: int) -> nn.Sequential:
    """Three convolutions, one with stride 2; made for the 8x8 digits."""
    return _network(channels, strides=(1, 2, 1), num_classes=num_classes, in_channels=in_channels)


def cnn5(channels: Sequence[int], *, num_classes: int, in_channels: int) -> nn.Sequential:
    """Five convolutions, two with stride 2; made for 28x28 images."""
    return _network(channels, strides=(1, 2, 1, 2, 1), num_classes=num_classes, in_channels=in_channels)


def _network(channels: Sequence[int], *, strides: Sequence[int], num_classes: int, in_channels: int) -> nn.Sequential:
    """3x3 Conv-BatchNorm-ReLU for each of ``channels``, global average pooling, linear head."""
    layers: list[nn.Module] = []
    for out_channels, stride in zip(channels, strides, strict=True):
        layers += [
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        ]
        in_channels = out_channels
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))
    return nn.Sequential(*layers, *head)
