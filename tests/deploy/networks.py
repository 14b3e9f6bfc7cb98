"""Small networks of the usual kinds, with statistics and biases as training leaves them: not 0 and 1."""

from __future__ import annotations

from functools import partial

import timm
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import Bottleneck

VGG16 = [*(8, 8, "M", 16, 16, "M", 32, 32, 32, "M"), *(64, 64, 64, "M", 64, 64, 64, "M")]


def vgg16(batch_norm: bool = True) -> nn.Module:
    """VGG-16 of an eighth of the width, with a flattened map of 2×2."""
    features = tv.vgg.make_layers(VGG16, batch_norm)  # type: ignore[arg-type]
    head = nn.Sequential(nn.Linear(64 * 4, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), head)


NETWORKS = {
    "ResNet-18": partial(tv.resnet18, num_classes=10),
    "ResNet-50": partial(tv.ResNet, Bottleneck, [1, 2, 1, 1], num_classes=10),
    "VGG-16": vgg16,
    "MobileNetV3": partial(tv.mobilenet_v3_small, num_classes=10, width_mult=0.5),
    "ConvNeXt": partial(tv.ConvNeXt, [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)], num_classes=10),
    "ViT": partial(tv.VisionTransformer, 32, 8, 2, 4, 32, 128, num_classes=10),
    "ViT of timm": partial(timm.models.VisionTransformer, 32, 8, embed_dim=32, depth=2, num_heads=4, num_classes=10),
    "DenseNet": partial(tv.DenseNet, 8, (2, 3, 2), 16, num_classes=10),
}
"""By name what makes one, for images of 32×32; most have fewer layers and channels than the published ones."""


def trained(model: nn.Module) -> nn.Module:
    """Give all biases, statistics and heads values, in place."""
    generator = torch.Generator().manual_seed(1)

    def fill(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layer_scale"):  # 1e-6 would hide all that follows it
                fill(parameter, 0.5, 1.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                fill(module.weight, 0.5, 1.5)
                fill(module.bias, -0.5, 0.5)
                fill(module.running_mean, -0.5, 0.5)
                fill(module.running_var, 0.5, 1.5)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                if not module.weight.any():
                    fill(module.weight, -0.5, 0.5)
                if module.bias is not None:
                    fill(module.bias, -0.5, 0.5)
    return model.eval()


def network(name: str) -> nn.Module:
    """One of ``NETWORKS``."""
    torch.manual_seed(0)
    return trained(NETWORKS[name]())


def differs(model: nn.Module, other: nn.Module, *shape: int) -> float:
    """The largest difference of outputs on random inputs, relative to the largest output."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found, expected = model(x), other(x)
    assert expected.abs().max() > 0, "this compares nothing"
    return float((found - expected).abs().max() / expected.abs().max())


def set_zero(model: nn.Module, dead: dict[str, list[int]]) -> nn.Module:
    """Set filters to zero, in place; ``dead`` holds their numbers by the layer's name."""
    with torch.no_grad():
        for name, filters in dead.items():
            model.get_parameter(f"{name}.weight")[filters] = 0
    return model
