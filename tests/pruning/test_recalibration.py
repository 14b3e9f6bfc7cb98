"""BatchNorm's statistics after recalibration; tests/multiprocess has several ranks, tests/evaluate the accuracy."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.errors import UserError
from sfw_dist.models import build_model
from sfw_dist.pruning import prune
from sfw_dist.pruning.recalibration import batch_norms, recalibrate, recalibrated_statistics
from tests.support.pruning import compute_masks

ALONE = RankGroup.alone()


def _model() -> nn.Module:
    """BatchNorm with statistics from earlier training, dropout, and a second BatchNorm after the first."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.9), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
    )
    for norm in batch_norms(model).values():
        nn.init.normal_(norm.weight)
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.num_batches_tracked += 7
    return model


def _batches(count: int = 5) -> list[Tensor]:
    return [3 * torch.randn(4 + i, 3, 8, 8) + i for i in range(count)]


def _float64_statistics(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """The definition, layer by layer: the mean over the batches of each batch's mean and unbiased variance."""
    sums: dict[str, Tensor] = {}
    for x in batches:
        x = x.double()
        for name, layer in model.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=1)
                for key, value in (("running_mean", mean), ("running_var", var)):
                    sums[f"{name}.{key}"] = sums.get(f"{name}.{key}", torch.zeros(())) + value / len(batches)
                centred = (x - mean[:, None, None]) / (x.var((0, 2, 3), correction=0) + layer.eps).sqrt()[:, None, None]
                x = centred * layer.weight.double()[:, None, None] + layer.bias.double()[:, None, None]
            elif not isinstance(layer, nn.Dropout):
                x = copy.deepcopy(layer).double()(x)
    return sums


def test_statistics_are_the_mean_over_the_batches() -> None:
    """Momentum weighs the last batches more, old statistics shine through, or dropout acts meanwhile."""
    model, batches = _model(), _batches()
    with torch.no_grad():
        expected = _float64_statistics(model, batches)
    assert recalibrate(model, iter(batches)) == 5
    state = model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(state[name].double(), value, rtol=2e-5, atol=2e-6)
    assert {int(norm.num_batches_tracked) for norm in batch_norms(model).values()} == {5}


def test_weights_modes_and_momenta_stay() -> None:
    """Recalibration trains; or a network that goes on training afterwards does so with other settings."""
    model = _model()
    model.train()
    model[1].eval()  # frozen
    model[5].momentum = 0.25
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    recalibrate(model, _batches())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert [norm.momentum for norm in batch_norms(model).values()] == [0.1, 0.25]
    with pytest.raises(RuntimeError):
        recalibrate(model, [torch.zeros(2, 5, 8, 8)])
    assert [module.training for module in model.modules()] == modes


def test_many_networks_in_one_pass_are_each_as_if_alone() -> None:
    """Statistics of one sparsity leak into another's, or the model itself is changed."""
    model, batches = _model().eval(), _batches()
    before = copy.deepcopy(model.state_dict())
    sparsities = (0.9, 0.0, 0.5)
    masks = [compute_masks(model, sparsity) for sparsity in sparsities]
    together = recalibrated_statistics(model, masks, iter(batches), ALONE)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for sparsity, statistics in zip(sparsities, together, strict=True):
        alone = copy.deepcopy(model)
        prune(alone, sparsity)
        recalibrate(alone, batches)
        expected = {name: buffer for name, buffer in alone.named_buffers()}
        assert statistics.keys() == expected.keys()
        assert all(torch.equal(statistics[name], expected[name]) for name in expected)
        assert all(statistics[name].dtype == expected[name].dtype for name in expected)


def test_without_batchnorm_nothing_is_done() -> None:
    """A network without BatchNorm is an error, or runs over all the data for nothing."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert batch_norms(model) == {} and recalibrate(model, iter(int, 1)) == 0  # type: ignore[arg-type]
    masks = [compute_masks(model, 0.5)] * 2
    assert recalibrated_statistics(model, masks, [], ALONE) == [{}, {}]
    assert recalibrated_statistics(_model(), [], [], ALONE) == []


def test_no_batch_leaves_the_statistics() -> None:
    """They are reset and then not measured: the network is worthless, and nobody is told."""
    model = _model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="give at least one"):
        recalibrate(model, [])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["cnn5", "resnet18", "vgg16", "torchvision/mobilenet_v3_small"])
def test_every_model_takes_it(name: str) -> None:
    """A layer that is not found keeps the statistics of the dense network."""
    width = 1.0 if "/" in name else 0.0625
    model = build_model(name, num_classes=10, in_channels=3, width=width)
    assert batch_norms(model) and recalibrate(model, [torch.randn(4, 3, 32, 32)] * 2) == 2
    assert {int(norm.num_batches_tracked) for norm in batch_norms(model).values()} == {2}


class _Keywords(nn.Module):
    """Takes its input by name, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _model()

    def forward(self, pixels: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.inner(pixels if scale is None else pixels * scale)  # type: ignore[no-any-return]


class _Example(NamedTuple):
    pixels: Tensor
    label: Tensor


_LABELS = torch.zeros(2)


@pytest.mark.parametrize(
    "batch",
    [
        lambda x: x,
        lambda x: (x, _LABELS),
        lambda x: [x, _LABELS],
        lambda x: _Example(x, _LABELS),
        lambda x: {"pixels": x, "labels": _LABELS},
        lambda x: UserDict(pixels=x, scale=torch.ones(()), labels=_LABELS),
        lambda x: ({"pixels": x}, _LABELS),
    ],
    ids=["tensor", "tuple", "list", "namedtuple", "dict", "mapping", "tuple of dict"],
)
def test_batches_are_those_of_a_loader(batch: Callable[[Tensor], Any]) -> None:
    """Fails when a loader of (inputs, labels) or of dictionaries must be rewritten, or labels reach the model."""
    model, batches = _Keywords(), _batches(3)
    expected = copy.deepcopy(model)
    recalibrate(expected.inner, batches)
    loader = [batch(x) for x in batches]
    (found,) = recalibrated_statistics(model, [compute_masks(model, 0.0)], loader, ALONE)
    recalibrate(model, loader)
    for name, buffer in expected.named_buffers():
        assert model.get_buffer(name).equal(buffer) and found[name].equal(buffer)


def test_wrappers_take_dictionaries_too() -> None:
    """Fails when the keywords are looked up in the wrapper, whose forward takes anything, labels too."""
    for wrap in (nn.DataParallel, lambda model: torch.compile(model, backend="eager")):
        model = _Keywords()
        assert recalibrate(wrap(model), [{"pixels": x, "labels": _LABELS} for x in _batches(2)]) == 2
        assert {int(norm.num_batches_tracked) for norm in batch_norms(model).values()} == {2}


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({"image": _LABELS}, "a batch has the keys image, and forward takes pixels, scale: name them alike"),
        ((), r"a batch is an empty tuple: give tensors, or \(inputs, labels\)"),
    ],
)
def test_unfit_batches_are_told_in_one_line(batch: Any, told: str) -> None:
    """Fails when they are a traceback out of the model."""
    with pytest.raises(UserError, match=told) as caught:
        recalibrate(_Keywords(), [batch])
    assert "\n" not in str(caught.value)


def test_batches_go_to_the_device_of_the_model_or_the_one_given() -> None:
    """Fails when a loader's CPU tensors meet a network on a GPU."""
    devices: list[torch.device] = []

    class Batch:
        def to(self, device: torch.device) -> Tensor:
            devices.append(device)
            return torch.randn(4, 3, 8, 8)

    recalibrate(_model(), [Batch()])
    recalibrate(_model(), [[Batch(), Batch()]], device="cpu:0")
    assert devices == [torch.device("cpu"), torch.device("cpu:0")]


def _interrupted(batches: list[Tensor], error: BaseException) -> Iterator[Tensor]:
    yield from batches
    raise error


def _everything(model: nn.Module) -> list[Any]:
    """Values and identity of all that a failed recalibration must leave."""
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [(id(tensor), tensor._version, tensor.tolist()) for tensor in tensors],
        [(module.training, getattr(module, "momentum", None)) for module in model.modules()],
    ]


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()], ids=["loader", "interrupt"])
def test_a_failure_leaves_everything(error: BaseException) -> None:
    """Fails when half-measured statistics stay: mean 0 and variance 1, say, of a network that was good before."""
    model = _model()
    model[1].eval()
    model[5].momentum = 0.25
    before = _everything(model)
    with pytest.raises(type(error)):
        recalibrate(model, _interrupted(_batches(2), error))
    assert _everything(model) == before
    with pytest.raises(RuntimeError):  # the forward pass of the third batch
        recalibrate(model, [*_batches(2), torch.zeros(2, 5, 8, 8)])
    assert _everything(model) == before
    with pytest.raises(type(error)):
        recalibrated_statistics(model, [compute_masks(model, 0.5)], _interrupted(_batches(2), error), ALONE)
    assert _everything(model) == before


def test_a_failure_while_statistics_are_written_leaves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when Ctrl-C leaves the first layers with new statistics and the last ones with old ones."""
    model = _model()
    before = copy.deepcopy(model.state_dict())
    last = model[5].num_batches_tracked
    get_buffer = model.get_buffer

    def interrupted(name: str) -> Tensor:
        buffer = get_buffer(name)
        if buffer is last:
            assert not torch.equal(model[1].running_mean, before["1.running_mean"]), "the test interrupts too early"
            raise KeyboardInterrupt
        return buffer

    monkeypatch.setattr(model, "get_buffer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, _batches(2))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_layers_that_no_batch_reaches_keep_their_statistics() -> None:
    """Fails when a branch for training alone has mean 0 and variance 1 afterwards."""
    model = _model()
    model.branch = nn.BatchNorm2d(3)
    model.branch.forward = lambda x: x  # type: ignore[method-assign]
    model.branch.running_mean.fill_(4.0)
    unused = copy.deepcopy(model.branch.state_dict())
    recalibrate(model, _batches(2))
    assert int(model[1].num_batches_tracked) == 2
    assert all(torch.equal(unused[name], tensor) for name, tensor in model.branch.state_dict().items())
    (found,) = recalibrated_statistics(model, [compute_masks(model, 0.5)], _batches(2), ALONE)
    assert (
        torch.equal(found["branch.running_mean"], torch.full((3,), 4.0))
        and found.keys() == dict(model.named_buffers()).keys()
    )


def test_unusual_layers_are_measured_as_the_usual_ones() -> None:
    """Fails when momentum None, a missing counter, a layer without parameters or one used twice is measured wrongly."""
    torch.manual_seed(0)
    batches = [torch.randn(6, 4) + i for i in range(3)]
    means = torch.stack([x.mean(0) for x in batches]).mean(0)
    for norm in (
        nn.BatchNorm1d(4, momentum=None),
        nn.BatchNorm1d(4, affine=False),
        nn.SyncBatchNorm(4),
        nn.BatchNorm1d(4),
    ):
        if isinstance(norm, nn.BatchNorm1d) and norm.affine and norm.momentum is not None:
            norm.num_batches_tracked = None
        assert recalibrate(nn.Sequential(norm), batches) == 3
        torch.testing.assert_close(norm.running_mean, means)
        assert norm.num_batches_tracked is None or int(norm.num_batches_tracked) == 3
    twice = nn.BatchNorm1d(4)
    recalibrate(nn.Sequential(twice, twice), batches)
    assert int(twice.num_batches_tracked) == 6
    torch.testing.assert_close(twice.running_mean, means / 2, atol=1e-6, rtol=0)  # of the batches, and of zeros


def test_layers_told_not_to_track_are_left_alone() -> None:
    """Fails when statistics that the user has fixed are reset, or hidden from the layers after them."""
    fixed = nn.BatchNorm1d(4)
    fixed.running_mean.fill_(2.0)  # type: ignore[union-attr]
    fixed.track_running_stats = False
    model = nn.Sequential(fixed, nn.BatchNorm1d(4))
    x = torch.randn(64, 4)
    assert recalibrate(model, [x]) == 1
    assert torch.equal(fixed.running_mean, torch.full((4,), 2.0))  # type: ignore[arg-type]
    torch.testing.assert_close(model[1].running_mean, x.mean(0) - 2.0, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.Sequential(nn.LazyBatchNorm1d()), "^0 is not initialised yet: run one batch"),
        (nn.Sequential(nn.BatchNorm1d(4, device="meta")), "^0 is on the meta device, without values: load"),
    ],
)
def test_layers_without_statistics_are_told(model: nn.Module, told: str) -> None:
    """Fails when they are a traceback, or a lazy layer takes its size from whatever comes first."""
    with pytest.raises(UserError, match=told):
        recalibrate(model, [torch.randn(8, 4)])


def test_batches_without_samples_do_not_count() -> None:
    """Fails when the statistics are a mean over one batch more than there is, pulled to zero."""
    first, last, empty = torch.randn(8, 4) + 1, torch.randn(8, 4), torch.zeros(0, 4)
    expected, found = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    assert recalibrate(expected, [first, last]) == recalibrate(found, [empty, first, empty, last]) == 2
    assert torch.equal(found.running_mean, expected.running_mean)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    pruning = prune(net, 0.5)
    one, other = (
        recalibrated_statistics(net, [pruning], batches, ALONE)[0]["1.running_mean"]
        for batches in ([first, last], [empty, first, empty, last])
    )
    assert torch.equal(one, other)


def test_recalibrating_leaves_the_batches() -> None:
    """Fails when a network that changes its inputs changes the caller's data."""
    batch = torch.randn(8, 4)
    before = batch.clone()
    recalibrate(nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(4)), [batch])
    assert torch.equal(batch, before)
    with pytest.raises(UserError, match="loader is None, which gives no batches: give a DataLoader"):
        recalibrate(nn.BatchNorm1d(4), None)  # type: ignore[arg-type]


def test_many_prunings_at_a_time_need_a_batch() -> None:
    """Fails when no batch gives mean 0."""
    model = _model()
    masks = [compute_masks(model, 0.5)]
    with pytest.raises(UserError, match="give at least one"):
        recalibrated_statistics(model, masks, [], ALONE)
