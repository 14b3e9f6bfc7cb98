"""The check of a network with the images of a data set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sfw_dist.errors import UserError
from sfw_dist.models import build_model
from sfw_dist.models.check import check_network
from tests.support import networks

CPU = torch.device("cpu")


class _Rounded(nn.Module):
    """Returns logits of another type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 10, dtype=self.dtype)


def check(model: nn.Module, size: int = 8, channels: int = 1) -> set[nn.Module]:
    return check_network(model, "net", image_shape=(channels, size, size), num_classes=10, device=CPU)


def test_a_check_leaves_no_trace_but_training_mode() -> None:
    """Fails when running statistics see black images, the seed's draws move on, or hooks stay."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 10)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert check(model) == set(model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_layers_whose_weights_others_read_are_not_called() -> None:
    """Fails when FSDP would leave the projections of Swin's attention in shards."""
    model = networks.swin(10, 1)
    called = check(model)
    idle = {name for name, module in model.named_modules() if module not in called}
    assert {name.rpartition(".")[2] for name in idle} == {"qkv", "proj"}


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            networks.Bare(10),
            r"^model.name net: the model returns a list of nothing, in which no class",
        ),
        (networks.Pair(10), r"^net returns a tuple with entry 2 beside its logits, which nothing would train"),
        (networks.WithAuxiliaryHead(10), r"with aux_logits beside its logits, which nothing.*{aux_logits: false}"),
        (networks.Named(3), r"returns a tensor of shape \(2, 3\) for 2 images of 10 classes: return logits of shape"),
        (_Rounded(torch.int64), r"^net returns logits of torch.int64: return floating-point numbers"),
        (_Rounded(torch.complex64), r"^net returns logits of torch.complex64: return floating-point numbers"),
        (nn.Linear(9, 10), r"^net cannot take images of 1×8×8 \(RuntimeError: .*model.kwargs \(timm: img_size"),
    ],
    ids=["nothing", "pair", "auxiliary head", "classes", "integers", "complex", "size"],
)
def test_a_network_that_does_not_fit_is_one_line(model: nn.Module, told: str) -> None:
    """Fails when it is a traceback in the first step, or a network of other classes trains."""
    with pytest.raises(UserError, match=told) as caught:
        check(model)
    assert "\n" not in str(caught.value)


def test_googlenet_trains_without_auxiliary_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when its output in training is not what it is in evaluation."""
    monkeypatch.setattr("torch.nn.init.trunc_normal_", lambda tensor, *_, **__: tensor)  # takes seconds
    check(build_model("torchvision/googlenet", num_classes=10), size=32, channels=3)
    with pytest.raises(UserError, match="GoogLeNetOutputs with aux_logits2, aux_logits1 beside its logits"):
        model = build_model("torchvision/googlenet", num_classes=10, kwargs={"aux_logits": True})
        check(model, size=32, channels=3)
