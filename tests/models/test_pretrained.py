"""Weights to start from: files, and what torchvision and timm publish, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from sfw_dist.errors import UserError
from sfw_dist.models import build_model
from sfw_dist.models.pretrained import load_by_name
from tests.support import networks

MOBILENET = "torchvision/mobilenet_v3_small"
VIT: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}


def net(classes: int = 2, channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes))


def test_a_head_for_other_classes_begins_anew_and_is_told() -> None:
    """Fails when it is left out silently, or other tensors with it."""
    source, target, told = net(5).state_dict(), net(2), list[str]()
    head = target[3].weight.detach().clone()
    load_by_name(target, source, "a.safetensors", 2, told.append)
    (line,) = told
    assert line == ("3.weight (2, 16), 3.bias (2,) begin anew: a.safetensors has 3.weight (5, 16), 3.bias (5,)")
    loaded = target.state_dict()
    assert torch.equal(loaded["3.weight"], head)
    assert all(torch.equal(loaded[name], source[name]) for name in source if not name.startswith("3."))


def test_a_head_that_fits_is_loaded_without_a_word() -> None:
    """Fails when a run that goes on with another's classes loses its head."""
    source, target, told = net().state_dict(), net(), list[str]()
    load_by_name(target, source, "a", 2, told.append)
    assert not told and all(torch.equal(tensor, source[name]) for name, tensor in target.state_dict().items())


def _without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in net().state_dict().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (net(channels=1).state_dict(), r"0.weight is \(4, 1, 3, 3\) in a and \(4, 3, 3, 3\) in the network"),
        (_without("1.running_mean"), "a lacks 1.running_mean: take weights of the same network"),
        (_without("3.weight"), "a lacks 3.weight"),
        (net().state_dict() | {"4.bias": torch.ones(1)}, "a has 4.bias, which the network has not"),
    ],
    ids=["channels", "missing", "no head", "unknown"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tensors: dict[str, Tensor], told: str) -> None:
    """Fails when a part of the network begins anew without a word."""
    with pytest.raises(UserError, match=told):
        load_by_name(net(), tensors, "a", 2, print)


def test_tied_weights_may_have_one_name_in_a_file() -> None:
    """Fails for exports that leave a shared tensor's second name out, as safetensors' own does."""
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    load_by_name(tied, {"0.weight": torch.eye(4)}, "a", 2, print)
    assert torch.equal(tied[1].weight, torch.eye(4))


def test_two_values_of_one_tied_weight_are_refused_by_name() -> None:
    """Fails when the one that is written last wins without a word; equal ones are taken."""
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    load_by_name(tied, {"0.weight": torch.eye(4), "1.weight": torch.eye(4).bfloat16()}, "a", 2, print)
    with pytest.raises(UserError, match=r"^0.weight and 1.weight are one tensor in the network and differ in a: take"):
        load_by_name(tied, {"0.weight": torch.eye(4), "1.weight": torch.ones(4, 4)}, "a", 2, print)
    assert torch.equal(tied[1].weight, torch.eye(4))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.ones(2, dtype=torch.bool), "3.bias is torch.bool in a and torch.float32 in the network"),
        (torch.ones(2, dtype=torch.int64), "3.bias is torch.int64 in a"),
        (torch.ones(2, dtype=torch.complex64), "3.bias is torch.complex64 in a"),
        (torch.tensor([0.0, torch.nan], dtype=torch.float16), "3.bias has NaN in a: take weights of a training"),
    ],
    ids=["bool", "integers", "complex", "nan"],
)
def test_values_that_are_no_weights_are_refused_by_name(value: Tensor, told: str) -> None:
    """Fails when imaginary parts are dropped, or a training begins with NaN."""
    with pytest.raises(UserError, match=told):
        load_by_name(net(), net().state_dict() | {"3.bias": value}, "a", 2, print)


def test_lazy_layers_are_one_line() -> None:
    """Fails when a file for them is a traceback on a shape that they have not yet."""
    with pytest.raises(UserError, match=r"^0.weight is not initialised yet.*run one batch through the model first"):
        load_by_name(nn.Sequential(nn.LazyLinear(2)), {"0.weight": torch.ones(2, 3)}, "a", 2, print)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, r"a.safetensors is no file: write the path"),
        (lambda path: path.write_bytes(b"torch"), r"a.safetensors cannot be read \("),
        (
            lambda path: (path.mkdir(), save_file(net().state_dict(), path / "model.safetensors")),
            r"a.safetensors is no file: write .*a.safetensors/model.safetensors",
        ),
    ],
    ids=["missing", "damaged", "a run"],
)
def test_a_file_that_cannot_be_read_is_one_line(make: Any, told: str, tmp_path: Path) -> None:
    """Fails when it is a traceback."""
    path = tmp_path / "a.safetensors"
    make(path)
    with pytest.raises(UserError, match=told):
        build_model("cnn", num_classes=2, width=0.1, pretrained=str(path))


def test_torchvisions_weights_are_taken_but_for_the_head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails when 1000 classes are trained instead of the data's, or the weights do not arrive."""
    published, told = torchvision.models.mobilenet_v3_small(), list[str]()
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("torchvision.models.WeightsEnum.get_state_dict", lambda *_, **__: published.state_dict())
    model = build_model(MOBILENET, num_classes=5, pretrained=True, tell=told.append)
    assert torch.equal(model.get_parameter("features.0.0.weight"), published.features[0][0].weight)
    assert told[0].startswith("classifier.3.weight (5, 1024), classifier.3.bias (5,) begin anew")
    with pytest.raises(UserError, match=r"features.0.0.weight is \(16, 3, 3, 3\) in torchvision.*\(16, 1, 3, 3\)"):
        build_model(MOBILENET, num_classes=5, in_channels=1, pretrained=True)


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails when a node without a network answers with a traceback."""

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torchvision.models.WeightsEnum.get_state_dict", fails)
    with pytest.raises(
        UserError, match=r"from its published weights \(OSError: no route to host\): give a safetensors"
    ):
        build_model(MOBILENET, num_classes=5, pretrained=True)


def test_networks_that_scale_images_say_so_with_published_weights() -> None:
    """Fails when googlenet's weights see images of another scale than they were trained with."""
    with pytest.raises(UserError, match=r"write model.kwargs {transform_input: true}"):
        build_model("torchvision/googlenet", num_classes=5, kwargs={"init_weights": False}, pretrained=True)


def test_timm_loads_its_own_weights_and_what_it_replaced_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when timm is not asked for weights, or a head that is not the published one passes for it."""
    create, asked, told = timm.create_model, list[bool](), list[str]()

    def without_download(*args: Any, pretrained: bool, **options: Any) -> nn.Module:
        asked.append(pretrained)
        return create(*args, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(timm, "create_model", without_download)
    name = "timm/vit_tiny_patch16_224"
    build_model(name, num_classes=5, in_channels=1, kwargs=VIT, pretrained=True, tell=told.append)
    assert asked == [True]
    assert told == [
        f"head begins anew: it has 5 classes here, 1000 in the weights of {name}",
        f"patch_embed.proj takes 1 channels here, 3 in the weights of {name}: timm has summed or repeated its weights",
    ]


def test_an_own_function_is_asked_for_weights_if_it_has_them() -> None:
    """Fails when it trains from new weights although the configuration says otherwise."""
    own = f"{networks.__name__}:"
    build = {"num_classes": 2, "in_channels": 1}
    assert bool((build_model(f"{own}startable", **build, pretrained=True).get_parameter("1.weight") == 0.5).all())
    assert bool((build_model(f"{own}startable", **build).get_parameter("1.weight") != 0.5).all())
    with pytest.raises(UserError, match="named has no argument pretrained: add it"):
        build_model(f"{own}named", **build, pretrained=True)
