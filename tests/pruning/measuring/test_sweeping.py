"""The curve of a model: what is measured is what ``prune`` leaves, and the model is afterwards what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sfw_dist import prune, recalibrate, sweep
from sfw_dist.errors import UserError
from sfw_dist.pruning import PAPER_SPARSITIES

SPARSITIES = [0.0, 0.5, 0.8]
Batches = list[tuple[Tensor, Tensor]]


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 7)
    )


def _plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 7))


def _batches(*sizes: int) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 6, generator=generator) + 0.3, torch.randint(7, (n,), generator=generator))
        for n in sizes or (9, 9, 4)
    ]


def _everything(model: nn.Module) -> list[Any]:
    """Values, identity and modes: what a sweep must leave, to the bit."""
    tensors = [*model.parameters(), *model.buffers()]
    modes = [(module.training, getattr(module, "momentum", None)) for module in model.modules()]
    return [[(id(x), x._version, x.tolist()) for x in tensors], modes]


@torch.no_grad()
def _measured(model: nn.Module, batches: Batches) -> dict[str, float]:
    """The definition, from all samples together."""
    logits = torch.cat([model.eval()(x) for x, _ in batches]).double()
    labels = torch.cat([y for _, y in batches])
    ranks = logits.argsort(1, descending=True).eq(labels[:, None]).int().argmax(1)
    loss = F.cross_entropy(logits, labels)
    return {"top1": float((ranks < 1).double().mean()), "top5": float((ranks < 5).double().mean()), "loss": float(loss)}


def test_each_point_is_what_prune_and_recalibrate_leave() -> None:
    """Fails when a mask or statistics leak from one sparsity into another, dropout acts, or batches weigh the same."""
    model, test, training = _net(), _batches(), _batches(12, 12)
    model.train()
    model[1].eval()  # frozen
    before = _everything(model)
    curve = sweep(model, test, SPARSITIES, calibration=training)
    assert _everything(model) == before
    assert [point.sparsity for point in curve] == SPARSITIES
    for point in curve:
        alone = copy.deepcopy(model)
        masks = prune(alone, point.sparsity)
        assert point.metrics == pytest.approx(_measured(alone, test), rel=1e-6)
        assert recalibrate(alone, training) == 2
        assert point.recalibrated == pytest.approx(_measured(alone, test), rel=1e-6)
        assert (point.prunable_kept, point.prunable_total) == (masks.kept, masks.total)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert (point.parameters_kept, point.parameters_total) == (parameters - masks.total + masks.kept, parameters)
        assert point.samples == 22


@pytest.mark.parametrize(
    "words",
    [
        {"scope": "all"},
        {"ranking": "layerwise"},
        {"granularity": "filter"},
        {"granularity": "rank"},
        {
            "scores": {
                name: torch.rand_like(parameter) for name, parameter in _plain().named_parameters() if "weight" in name
            }
        },
    ],
    ids=lambda words: "-".join(words),
)
def test_the_words_are_those_of_prune(words: dict[str, Any]) -> None:
    """Fails when an option is not handed on, and another pruning is measured under its name."""
    (point,) = sweep(_plain(), _batches(), [0.6], **words)
    pruned = _plain()
    assert point.prunable_kept == prune(pruned, 0.6, **words).kept
    assert point.metrics == pytest.approx(_measured(pruned, _batches()), rel=1e-5)


def test_the_default_sparsities_are_those_of_the_granularity() -> None:
    """Fails when 2:4, which takes one sparsity alone, needs a list."""
    net = nn.Linear(8, 3)
    batches = [(torch.randn(4, 8), torch.zeros(4, dtype=torch.int64))]
    assert [point.sparsity for point in sweep(net, batches)] == [0.0, *PAPER_SPARSITIES]
    assert [point.sparsity for point in sweep(net, batches, granularity="2:4")] == [0.5]


class _Keywords(nn.Module):
    """As Hugging Face's models: inputs by name, and an object with the loss and the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _plain()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.net(pixel_values)
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        pytest.param(_plain, lambda x, y: (x, y), id="tuples"),
        pytest.param(_plain, lambda x, y: [x, y.int(), "names"], id="lists"),
        pytest.param(_Keywords, lambda x, y: {"pixel_values": x, "labels": y, "names": "x"}, id="dictionaries"),
        pytest.param(_Keywords, lambda x, y: {"pixel_values": x, "label": y}, id="label"),
        pytest.param(_Keywords, lambda x, y: ({"pixel_values": x}, y), id="inputs by name"),
    ],
)
def test_loaders_and_outputs_of_every_kind_give_one_curve(
    model: Callable[[], nn.Module], batch: Callable[[Tensor, Tensor], Any]
) -> None:
    """Fails when a user must rewrite a loader or a model."""
    expected = sweep(_plain(), _batches(), SPARSITIES)
    found = sweep(model(), (batch(x, y) for x, y in _batches()), SPARSITIES)
    assert [point.metrics for point in found] == [point.metrics for point in expected]


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda model: torch.compile(model, backend="eager")],
    ids=["DataParallel", "compile"],
)
def test_wrapped_models_give_the_same_curve(wrap: Callable[[nn.Module], Any]) -> None:
    """Fails when a wrapper goes on with the weights that it has seen first."""
    expected = sweep(_net(), _batches(), SPARSITIES, calibration=_batches(8))
    wrapped = wrap(_net())
    before = _everything(wrapped)
    found = sweep(wrapped, _batches(), SPARSITIES, calibration=_batches(8))
    assert _everything(wrapped) == before
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.metrics == pytest.approx(theirs.metrics) and mine.recalibrated == pytest.approx(theirs.recalibrated)


def test_weights_with_a_second_name_and_autocasts_copies_follow() -> None:
    """Fails when an LSTM's own list of its weights, or autocast's converted copies, are those of another sparsity."""
    torch.manual_seed(0)
    lstm, x = nn.LSTM(6, 7, batch_first=True), torch.randn(4, 5, 6)
    curve = sweep(lstm, [x], SPARSITIES, scope="all", metric=lambda output, _: output[0].square().mean())
    for point in curve:
        pruned = copy.deepcopy(lstm)
        prune(pruned, point.sparsity, scope="all")
        assert point.metrics["metric"] == pytest.approx(pruned(x)[0].square().mean().item())
    with torch.autocast("cpu", torch.bfloat16):
        together = sweep(_plain(), _batches(), SPARSITIES)
    for point in together:
        pruned = _plain()
        prune(pruned, point.sparsity)
        with torch.autocast("cpu", torch.bfloat16):
            assert point.metrics == pytest.approx(_measured(pruned, _batches()), rel=1e-3)


def test_a_model_that_changes_its_inputs_does_not_change_the_next_ones() -> None:
    """Fails when the second sparsity is measured on what the first one has left of the batch."""
    whole, (x, y) = _plain(), _batches(20)[0]
    changing = nn.Sequential(nn.ReLU(inplace=True), nn.Hardtanh(0.1, 0.5, inplace=True), *whole)
    apart = [sweep(changing, [(x.clone(), y)], [sparsity])[0].metrics for sparsity in SPARSITIES]
    assert [point.metrics for point in sweep(changing, [(x, y)], SPARSITIES)] == apart


def test_without_batchnorm_calibration_is_not_read() -> None:
    """Fails when a pass over the training data is made for nothing, or a column of equal numbers is shown."""

    def never() -> Iterator[Tensor]:
        raise AssertionError("read")
        yield

    (point,) = sweep(_plain(), _batches(), [0.5], calibration=never())
    assert point.recalibrated is None
    assert sweep(_net(), _batches(), [0.5])[0].recalibrated is None


def test_calibration_takes_as_many_batches_as_it_is_told() -> None:
    """Fails when one more batch is taken from an iterator, or an endless loader is read for ever."""
    some = iter(_batches(8, 8, 8, 5))
    one = sweep(_net(), _batches(), [0.5], calibration=some, calibration_batches=3)
    assert len(next(some)[1]) == 5
    assert one[0] == sweep(_net(), _batches(), [0.5], calibration=_batches(8, 8, 8), calibration_batches=None)[0]
    endless = (batch for _ in iter(int, 1) for batch in _batches(8))
    assert sweep(_net(), _batches(), [0.5], calibration=endless)[0].recalibrated is not None
    with pytest.raises(UserError, match="calibration_batches must be at least 1, got 0"):
        sweep(_net(), _batches(), [0.5], calibration=[], calibration_batches=0)


def test_a_metric_of_ones_own_is_averaged_over_samples() -> None:
    """Fails when the last, smaller batch weighs as much as the others, or a name is lost."""

    def errors(output: Tensor, target: Tensor) -> dict[str, Any]:
        return {"squared": (output - target).square().mean(), "largest": float(output.max()), "one": 1}

    net, data = nn.Linear(6, 2), [(torch.randn(n, 6), torch.randn(n, 2)) for n in (8, 8, 3)]
    (point,) = sweep(net, data, [0.0], metric=errors)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    assert point.metrics["squared"] == pytest.approx((net(x) - y).square().mean().item(), rel=1e-5)
    assert list(point.metrics) == ["squared", "largest", "one"] and point.metrics["one"] == 1
    named = [{"pixel_values": x, "labels": torch.zeros(len(x)).long()} for x, _ in data]
    (point,) = sweep(_Keywords(), named, [0.5], metric=lambda output, _: output.loss)
    assert list(point.metrics) == ["metric"]


def test_a_metric_may_have_no_targets_or_the_whole_dictionary() -> None:
    """Fails when an autoencoder cannot be measured, or targets are silently something else."""
    seen: list[Any] = []
    sweep(_plain(), [torch.ones(3, 6)], [0.5], metric=lambda output, target: seen.append(target) or 0.0)
    sweep(_Keywords(), [{"pixel_values": torch.ones(3, 6), "mask": 1}], [0.5], metric=lambda o, t: seen.append(t) or 0)
    assert seen[0] is None and set(seen[1]) == {"pixel_values", "mask"}


def test_a_loss_that_is_not_a_number_stays_one() -> None:
    """Fails when an overflow is averaged away or stops the sweep."""
    net = _plain()
    curve = sweep(net, [(torch.full((4, 6), torch.inf), torch.zeros(4, dtype=torch.int64)), *_batches()], [0.0, 0.5])
    assert all(point.metrics["loss"] != point.metrics["loss"] for point in curve)
    assert "nan" in curve.table()


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()], ids=["loader", "interrupt"])
@pytest.mark.parametrize("where", ["loader", "calibration", "metric"])
def test_a_failure_leaves_the_model(error: BaseException, where: str) -> None:
    """Fails when a notebook's model is pruned after Ctrl-C."""
    model = _net()
    model.train()
    before = _everything(model)

    def broken() -> Iterator[Any]:
        yield from _batches()
        raise error

    def metric(output: Tensor, _: Tensor) -> float:
        if where == "metric" and not torch.equal(model[0].weight, _net()[0].weight):
            raise error
        return 0.0

    data = {name: broken() if where == name else iter(_batches()) for name in ("loader", "calibration")}
    with pytest.raises(type(error)):
        sweep(model, data["loader"], SPARSITIES, calibration=data["calibration"], metric=metric)
    assert _everything(model) == before


def test_a_backward_pass_that_has_begun_goes_on() -> None:
    """Fails when a sweep between a forward pass and its backward pass stops training."""
    model, (x, y) = _plain(), _batches()[0]
    loss = F.cross_entropy(model(x), y)
    sweep(model, _batches(), SPARSITIES)
    loss.backward()
    expected = _plain()
    F.cross_entropy(expected(x), y).backward()
    assert model[0].weight.grad.equal(expected[0].weight.grad)


X, Y = torch.ones(4, 6), torch.tensor([0, 1, 2, 6])


@pytest.mark.parametrize(
    ("model", "batch", "told"),
    [
        (_plain(), (X, Y + 1), "a label is 7, and the logits are of classes 0 to 6"),
        (_plain(), (X, Y - 100), "a label is -100, and"),
        (_plain(), (X, F.one_hot(Y, 7).float()), r"got logits \(4, 7\) and torch.float32 labels \(4, 7\)"),
        (nn.Sequential(nn.Linear(6, 1)), (X, Y), r"got logits \(4, 1\) and torch.int64 labels \(4,\)"),
        (_plain(), (torch.ones(2, 3, 6), torch.zeros(2, 3).long()), r"got logits \(2, 3, 7\) .* give metric="),
        (_plain(), X, "a batch has no labels: give"),
        (_plain(), (X, {"boxes": Y}), "a batch has labels in a dict: give"),
        (_plain(), (X, None), "a batch has no labels: give"),
        (_plain(), (3, 4), r"a batch is a tuple without a tensor \(batch, ...\): give \(inputs, labels\)"),
    ],
)
def test_what_is_no_classification_is_told_in_one_line(model: nn.Module, batch: Any, told: str) -> None:
    """Fails when a language model's scores are taken for those of classes, or an error is a traceback of torch."""
    with pytest.raises(UserError, match=told) as caught:
        sweep(model, [batch], [0.5])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        (lambda o, t: o, r"metric gives metric of shape \(4, 7\): give one number"),
        (lambda o, t: "good", "metric gives metric as a str: give a number"),
        (lambda o, t: torch.tensor(1j), "metric gives metric as a complex number: give a real one"),
        (lambda o, t: {}, "metric gives an empty dictionary"),
        (lambda o, t: {"samples": 1}, "metric gives a number under 'samples': choose another name"),
        (lambda o, t: {"f1_recalibrated": 1}, "metric gives a number under 'f1_recalibrated': choose another name"),
        (lambda o, t: {str(len(o)): 1}, "metric gives 3 after 4: give the same names for each batch"),
    ],
    ids=["tensor", "text", "complex", "empty", "taken", "ending", "other"],
)
def test_a_metric_that_gives_no_numbers_is_told_in_one_line(metric: Callable[..., Any], told: str) -> None:
    """Fails when a sweep ends hours later in a traceback, or a column hides another one."""
    with pytest.raises(UserError, match=told):
        sweep(_plain(), [(X, Y), (X[:3], Y[:3])], [0.5], metric=metric)


@pytest.mark.parametrize(
    ("sparsities", "told"),
    [
        ([], "sparsities are empty"),
        (0.5, r"sparsities are 0.5: give a list of numbers, as \[0, 0.5, 0.9\]"),
        ("0.5,0.9", "sparsities are '0.5,0.9': give a list"),
        (torch.tensor([0.9]), r"sparsity must be a number, got tensor\(0.9000\)"),
        ([0.5, 90], r"sparsity must be in \[0, 1\), got 90"),
    ],
)
def test_sparsities_are_a_list_of_fractions(sparsities: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        sweep(_plain(), _batches(), sparsities)


def test_no_batch_is_told() -> None:
    """Fails when the mean of nothing is a traceback; an iterator that was read before is empty."""
    used = iter(_batches())
    sweep(_plain(), used, [0.5])
    with pytest.raises(UserError, match="no batch to measure: the loader gave none"):
        sweep(_plain(), used, [0.5])
    with pytest.raises(UserError, match="no batch to recalibrate BatchNorm with"):
        sweep(_net(), _batches(), [0.5], calibration=used)


def test_batches_go_to_the_device_of_the_model_or_the_one_given() -> None:
    """Fails when labels stay on the CPU next to logits on a GPU."""
    devices: list[torch.device] = []

    class Moving:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def to(self, device: torch.device) -> Tensor:
            devices.append(device)
            return self.tensor

    sweep(_plain(), [(Moving(X), Moving(Y))], [0.5], device="cpu:0")
    assert devices == [torch.device("cpu:0")] * 2


def test_progress_is_told_batch_by_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when a loader of a known length shows none, or an iterator's is asked for."""
    told: list[tuple[str, int, int | None]] = []
    loader = DataLoader(TensorDataset(*_batches(6)[0]), batch_size=2)
    many = iter(_batches(8, 8, 8))
    sweep(_net(), loader, [0.5], calibration=many, calibration_batches=2, progress=lambda *now: told.append(now))
    assert told == [("recalibrated", 1, 2), ("recalibrated", 2, 2), *(("measured", i, 3) for i in (1, 2, 3))]
    told.clear()
    sweep(_plain(), iter(_batches(6)), [0.5], progress=lambda *now: told.append(now))
    assert told == [("measured", 1, None)]
    sweep(_plain(), loader, [0.5])  # stderr is no terminal here
    assert capsys.readouterr().err == ""
    sweep(_plain(), loader, [0.5], progress=True)
    line = capsys.readouterr().err
    assert "\rmeasured 3 of 3 batches\r" in line and line.endswith(" \r") and "\n" not in line
