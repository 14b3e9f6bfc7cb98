"""The networks: the published sizes, the image sizes that they take, and errors that name the choices."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from sfw_dist.errors import UserError
from sfw_dist.models import build_model, model_names

OURS = ["resnet18", "vgg16", "cnn", "cnn5"]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def convolution_widths(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize(("name", "count"), [("resnet18", 11_173_962), ("vgg16", 14_728_266)])
def test_paper_networks_have_the_published_parameter_counts(name: str, count: int) -> None:
    """A bias too many, a max-pool stem or a larger head: the numbers would no longer compare with the paper's."""
    assert parameters(build_model(name, num_classes=10)) == count


@pytest.mark.parametrize(
    ("name", "channels", "strides"),
    [("cnn", [64, 128, 128], [1, 2, 1]), ("cnn5", [32, 64, 64, 128, 128], [1, 2, 1, 2, 1])],
)
def test_small_networks_are_the_measured_ones(name: str, channels: list[int], strides: list[int]) -> None:
    """Another width or stride, and recorded accuracies of the small networks no longer reproduce."""
    model = build_model(name, num_classes=10, in_channels=1)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == channels
    assert [c.stride[0] for c in convolutions] == strides
    assert all(c.kernel_size == (3, 3) for c in convolutions)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == len(channels)


def test_resnet18_keeps_the_resolution_until_its_second_stage() -> None:
    """An ImageNet stem shrinks 32x32 to 8x8 before the first block: same parameters almost, far worse accuracy."""
    model = build_model("resnet18", num_classes=10, width=0.05)
    sizes: list[int] = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        assert isinstance(stage, nn.Module)
        stage.register_forward_hook(lambda _module, _args, output: sizes.append(output.shape[-1]))
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert sizes == [32, 16, 8, 4]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_every_image_size_gives_one_row_of_logits_a_sample(name: str, size: int, in_channels: int) -> None:
    """Five halvings of 28 rounded down end in an image of size 0; a flattened 64x64 does not fit a head for 32x32."""
    model = build_model(name, num_classes=7, in_channels=in_channels, width=0.1)
    logits = model(torch.rand(2, in_channels, size, size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", OURS)
def test_channels_last_gives_the_same_logits(name: str) -> None:
    """A flatten of a channels_last map that relies on strides would shuffle the features of the head."""
    model = build_model(name, num_classes=10, width=0.25).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        contiguous = model(images)
        model.to(memory_format=torch.channels_last)
        channels_last = model(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, contiguous, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_width_scales_every_stage_and_keeps_one_channel(name: str) -> None:
    """A stage left at its full width, or rounded to no channel at all."""
    full = convolution_widths(build_model(name, num_classes=2))
    half = convolution_widths(build_model(name, num_classes=2, width=0.5))
    assert half == [channels // 2 for channels in full]
    assert set(convolution_widths(build_model(name, num_classes=2, width=1e-6))) == {1}


def test_any_torchvision_classifier_by_name() -> None:
    """The prefix is passed on to torchvision, or the number of classes is not."""
    model = build_model("torchvision/mobilenet_v3_small", num_classes=5).eval()
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("resnet81", "resnet18"),
        ("resnet50", "torchvision/resnet50"),
        ("torchvision/resnet5", "torchvision/resnet50"),
        ("torchvision/fcn_resnet50", "torchvision/resnet50"),  # a segmentation model
        ("torchvision/cnn", "cnn"),
        ("perceptron", None),
    ],
)
def test_an_unknown_name_is_answered_in_one_line_with_the_valid_ones(name: str, meant: str | None) -> None:
    """A KeyError, or torchvision's own message, tells the user nothing about what to write instead."""
    with pytest.raises(UserError) as caught:
        build_model(name, num_classes=10)
    message = str(caught.value)
    assert "\n" not in message
    assert repr(name) in message
    assert all(valid in message for valid in model_names())
    assert (meant is not None) == ("did you mean" in message)
    if meant is not None:
        assert meant in message.split("did you mean")[1].split("?")[0].split()


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("resnet18", {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ("resnet18", {"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ("resnet18", {"width": 0.0}, "got 0.0"),
        ("resnet18", {"width": float("nan")}, "got nan"),
        ("torchvision/resnet18", {"width": 0.5}, "got width=0.5: leave it at 1"),
    ],
)
def test_bad_arguments_name_the_value_and_the_remedy(name: str, arguments: dict[str, float], told: str) -> None:
    """Ignored, a width would leave a torchvision model at full size and in_channels would fail in the first step."""
    keywords: dict[str, float] = {"num_classes": 10} | arguments
    with pytest.raises(UserError) as caught:
        build_model(name, **keywords)  # type: ignore[arg-type]
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "swin_t", "convnext_tiny", "vgg11_bn"])
def test_torchvisions_networks_take_other_channels(name: str) -> None:
    """Fails when grey images need a network of one's own, or another convolution than the first is replaced."""
    with torch.device("meta"):
        model = build_model(f"torchvision/{name}", num_classes=5, in_channels=1)
        coloured = build_model(f"torchvision/{name}", num_classes=5)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    other = {key: tuple(t.shape) for key, t in coloured.state_dict().items() if tuple(t.shape) != shapes[key]}
    assert len(other) == 1 and next(iter(other.values()))[1] == 3
    assert shapes.keys() == coloured.state_dict().keys()


EXAMPLES = {"torchvision/<name>": "torchvision/squeezenet1_1", "timm/<name>": "timm/resnet10t"}
OWN = f"{__name__}:own_network"


def own_network(num_classes: int, in_channels: int) -> nn.Module:
    """A user's network."""
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


def sized_network(num_classes: int, in_channels: int, *, width: int = 4) -> nn.Module:
    """A user's network with an argument of its own."""
    return nn.Sequential(nn.Flatten(), nn.Linear(4 * in_channels, width), nn.Linear(width, num_classes))


def meta_network(num_classes: int, in_channels: int) -> nn.Module:
    """A network without values."""
    return nn.Linear(in_channels, num_classes, device="meta")


def no_network(num_classes: int, in_channels: int) -> str:
    """A user's mistake."""
    return "resnet18"


def test_help_names_can_all_be_built() -> None:
    """A help text that offers what `build_model` refuses."""
    pytest.importorskip("timm")
    for name in model_names():
        build_model(EXAMPLES.get(name, OWN if ":" in name else name), num_classes=10)


@pytest.mark.parametrize("name", [OWN, "timm/resnet10t"])
def test_models_of_others_take_classes_and_channels(name: str) -> None:
    """The number of classes or channels does not reach a user's function, or timm under its own argument names."""
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    model = build_model(name, num_classes=5, in_channels=1).eval()
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "kwargs", "shape"),
    [
        (f"{__name__}:sized_network", {"width": 6}, (6, 12)),
        ("torchvision/mobilenet_v3_small", {"width_mult": 0.5}, (8, 3, 3, 3)),
        ("timm/vit_tiny_patch16_224", {"img_size": 8, "patch_size": 4, "depth": 1, "embed_dim": 24}, (1, 1, 24)),
    ],
)
def test_kwargs_reach_models_of_others(name: str, kwargs: dict[str, object], shape: tuple[int, ...]) -> None:
    """A configuration that says one network, and another that is built."""
    model = build_model(name, num_classes=5, kwargs=kwargs)
    assert next(model.parameters()).shape == shape


@pytest.mark.parametrize(
    ("name", "kwargs", "told"),
    [
        ("cnn", {"depth": 2}, "cnn takes no model.kwargs, got depth: leave them out"),
        (f"{__name__}:sized_network", {"wide": 6}, "unexpected keyword argument 'wide'"),
        (
            f"{__name__}:sized_network",
            {"width": "six"},
            "sized_network cannot be built with model.kwargs {'width': 'six'}",
        ),
        (f"{__name__}:sized_network", {3: 6}, "model.kwargs has the key 3: write the names of"),
        ("cnn", {3: 6}, "model.kwargs has the key 3: write the names of"),
        (f"{__name__}:sized_network", {"num_classes": 6}, "model.kwargs has num_classes, which follows from the data"),
        ("torchvision/resnet18", {"weights": "DEFAULT"}, "model.kwargs has weights, which follows"),
        ("torchvision/resnet18", {"groups": 7}, "torchvision/resnet18 cannot be built with model.kwargs {'groups': 7}"),
        (
            "torchvision/mobilenet_v3_small",
            {"width_multi": 0.5},
            "takes no argument width_multi (model.kwargs): did you",
        ),
        ("timm/vit_tiny_patch16_224", {"in_chans": 1}, "model.kwargs has in_chans, which follows"),
        (
            "timm/vit_tiny_patch16_224",
            {"img_sizes": 8},
            "unexpected keyword argument 'img_sizes'): correct that argument",
        ),
    ],
)
def test_unknown_kwargs_are_one_line(name: str, kwargs: dict[str, object], told: str) -> None:
    """A traceback from another package; or an argument that torchvision swallows, so that it has no effect."""
    with pytest.raises(UserError) as caught:
        build_model(name, num_classes=10, kwargs=kwargs)
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "width", "told"),
    [
        (OWN, 0.5, "got width=0.5: leave it at 1"),
        ("timm/resnet10t", 0.5, "got width=0.5: leave it at 1"),
        ("timm/resnet10tt", 1.0, "did you mean timm/resnet10t?"),
        ("no.such:network", 1.0, "cannot import no.such:network"),
        ("math:network", 1.0, "cannot import math:network"),
        ("math:pi", 1.0, "math:pi is no function"),
        (f"{__name__}:meta_network", 1.0, "returned a network whose weight is on the meta device, without values"),
        (f"{__name__}:no_network", 1.0, "returned a str: return a torch.nn.Module"),
    ],
)
def test_models_of_others_that_cannot_be_built_are_one_line(name: str, width: float, told: str) -> None:
    """A traceback from an import, or a width that has no effect."""
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    with pytest.raises(UserError) as caught:
        build_model(name, num_classes=10, width=width)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_without_timm_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImportError's traceback."""
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs timm: pip install 'sfw-dist\[train\]'"):
        build_model("timm/resnet10t", num_classes=10)
