"""The layer table and the FLOPs, against counts by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.models.convnext import CNBlockConfig

from sfw_dist.errors import UserError
from sfw_dist.pruning import (
    Masks,
    count_flops,
    dead_layers,
    kept_flops,
    layer_table,
)
from tests.support.pruning import (
    compute_masks,
    linears,
    small_net,
)


def test_layer_table_and_dead_layers() -> None:
    """A layer without weights cuts the network in two; the report must say which."""
    model = linears([torch.full((2, 4), 0.1), torch.full((4, 2), 5.0)])
    masks = compute_masks(model, 0.5)
    assert dead_layers(masks) == ["0.weight"]
    assert layer_table(model, masks) == [
        {"name": "0.weight", "shape": [2, 4], "parameters": 8, "kept": 0, "sparsity": 1.0},
        {"name": "1.weight", "shape": [4, 2], "parameters": 8, "kept": 8, "sparsity": 0.0},
    ]


def test_flops_of_one_sample_by_hand() -> None:
    """A batch counted as one sample, multiply-adds counted once, or names that do not match those of the masks."""
    flops = count_flops(small_net(), torch.rand(5, 3, 5, 5))
    assert flops == {
        "0.weight": 2 * (8 * 3 * 3) * 3 * (3 * 3),  # (out * in * kh) * kw * output positions
        "2.weight": 2 * (16 * 8 * 3) * 3 * (1 * 1),
        "4.weight": 2 * 16 * 10,
    }


class CallsTwice(nn.Module):
    """One layer under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(4, 4)
        self.first, self.second = nn.Sequential(shared), nn.Sequential(shared)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def test_flops_of_a_shared_module_count_each_call() -> None:
    """By module path, a shared layer's work appears under the name that no mask has."""
    model = CallsTwice()
    flops = count_flops(model, torch.rand(1, 4))
    assert flops == {"first.0.weight": 2 * (2 * 4 * 4)}
    assert set(flops) == set(compute_masks(model, 0.5))


TOKENS, WIDTH = 5, 8
ATTENTION = {
    "products": 2 * 2 * TOKENS * TOKENS * WIDTH,
    "in": 2 * TOKENS * WIDTH * 3 * WIDTH,
    "out": 2 * TOKENS * WIDTH**2,
}
"""FLOPs by hand: queries with keys, and what they give with values; the projections before and after. The number of
heads does not matter."""


def test_attentions_flops_by_hand() -> None:
    """Counted by modules alone, attention has none: not its products, nor those of weights that its owner reads."""
    layer = nn.TransformerEncoderLayer(WIDTH, nhead=2, dim_feedforward=16, batch_first=True)
    flops = count_flops(nn.TransformerEncoder(layer, num_layers=1), torch.rand(3, TOKENS, WIDTH))
    assert flops == {
        "layers.0.self_attn.in_proj_weight": ATTENTION["in"],
        "layers.0.self_attn.out_proj.weight": ATTENTION["out"],
        "layers.0.linear1.weight": 2 * TOKENS * WIDTH * 16,
        "layers.0.linear2.weight": 2 * TOKENS * WIDTH * 16,
        "layers.0.self_attn": ATTENTION["products"],
    }
    assert torch.backends.mha.get_fastpath_enabled()


class Attention(nn.Module):
    """As timm writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_flops_of_fused_attention_by_hand() -> None:
    """Fails when a fused kernel hides the products from the counter."""
    flops = count_flops(nn.Sequential(Attention()), torch.rand(1, TOKENS, WIDTH))
    assert flops == {
        "0.qkv.weight": ATTENTION["in"],
        "0.proj.weight": ATTENTION["out"],
        "0": ATTENTION["products"],
    }


class MadeWeight(nn.Linear):
    """A layer that changes its weight before it multiplies, with another parameter at its side."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.down = nn.Parameter(torch.rand(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight - self.weight.mean(), self.bias)
        return y + (x @ self.down).mean()


def test_flops_of_a_layer_that_makes_its_factor_from_its_weight() -> None:
    """Fails when weight standardisation, or a cast of autocast, hides whose FLOPs they are."""
    net = nn.Sequential(MadeWeight(), nn.Linear(3, 2))
    flops = {"0.weight": 2 * 4 * 3, "1.weight": 2 * 3 * 2, "0.down": 2 * 4 * 2}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert count_flops(net, torch.rand(1, 4)) == flops


SMALL: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: models.VisionTransformer(64, 32, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32),
    "swin": lambda: models.SwinTransformer([4, 4], 8, depths=[2, 1], num_heads=[1, 2], window_size=[4, 4]),
    "convnext": lambda: models.ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)]),
    "mobilenet": lambda: models.mobilenet_v3_small(width_mult=0.25),
    "timm's vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=24, num_heads=2),
}


@pytest.mark.parametrize("name", SMALL)
def test_the_flops_are_those_of_the_whole_network(name: str) -> None:
    """Fails when a product is counted nowhere or twice, so that the speed-up told is not the network's."""
    model, images = SMALL[name]().eval().requires_grad_(False), torch.rand(1, 3, 64, 64)
    flops = count_flops(model, images)
    reference = FlopCounterMode(display=False)
    with _no_fast_path(), sdpa_kernel(SDPBackend.MATH), reference:
        model(images)
    assert sum(flops.values()) == reference.get_total_flops() > 0
    weights = set(compute_masks(model, 0.5))
    assert all(flops[name] for name in weights)
    others = {name for name in flops if name not in weights}
    assert all(name.endswith(("attn", "self_attention")) for name in others)
    assert bool(others) == (name in ("vit", "swin", "timm's vit"))


@contextmanager
def _no_fast_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_counting_flops_leaves_no_trace() -> None:
    """Running statistics moved by a random example, a frozen BatchNorm set to training, hooks that stay."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Dropout())
    model[1].eval()
    before = {name: b.clone() for name, b in model.named_buffers()}

    count_flops(model, torch.rand(2, 3, 8, 8))
    with pytest.raises(RuntimeError):
        count_flops(model, torch.rand(2, 1, 8, 8))

    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("lazy", [nn.LazyLinear(2), nn.LazyBatchNorm1d(affine=False)], ids=["weight", "statistics"])
def test_flops_of_a_lazy_layer_are_refused(lazy: nn.Module) -> None:
    """Fails when it is a traceback, or counting makes the layer's weights from the example."""
    with pytest.raises(UserError, match=r"^1\.\w+ is not initialised yet: run one batch through the model first$"):
        count_flops(nn.Sequential(nn.Linear(4, 2), lazy), torch.zeros(1, 4))


def test_kept_flops_weigh_each_layer_by_its_own_density() -> None:
    """The network's overall density instead: wrong wherever layers differ in work per weight."""
    masks = Masks({"a": torch.tensor([True, False, False, False]), "b": torch.tensor([True, True])})
    assert kept_flops({"a": 1000, "b": 10, "unmasked": 1}, masks) == 250 + 10 + 1
