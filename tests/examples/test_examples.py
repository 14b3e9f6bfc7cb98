"""The examples run as they say, and SFW works with what each framework does to an optimizer."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from sfw_dist import SFW, KSparsePolytope, Unconstrained, constrain
from tests.support.example_runs import (
    EXAMPLES,
    FIRST_AND_LAST,
    OFFLINE,
    PROGRAMS,
    accuracies,
    assert_same_state,
    start_example,
)

RANKS = {"fsdp_digits": 2}
"""Processes that torchrun starts in the first command of an example; the other examples are started by Python."""

IN_ONE_PROCESS = ("accelerate_digits", "lightning_digits", "timm_digits", "trainer_digits")
STEPS_OF_AN_EPOCH = 22
"""1,347 digits in batches of 64."""


def test_each_example_is_known_here() -> None:
    """Fails when an example is added that no test runs."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"digits", *FIRST_AND_LAST, *PROGRAMS}
    for name, launcher in PROGRAMS.items():
        assert f"    {launcher} examples/{name}.py\n" in (EXAMPLES / f"{name}.py").read_text()


# After so few epochs networks have learnt little; chance is 0.1.
@pytest.mark.parametrize(
    ("name", "epochs", "dense", "pruned"),
    [
        ("accelerate_digits", 2, 0.5, 0.5),
        ("fsdp_digits", 8, 0.5, 0.3),
        ("lightning_digits", 2, 0.5, 0.5),
        ("timm_digits", 3, 0.6, 0.5),
        ("trainer_digits", 4, 0.5, 0.5),
    ],
)
def test_an_example_trains_and_the_pruned_network_still_works(
    name: str, epochs: int, dense: float, pruned: float, tmp_path: Path
) -> None:
    """Fails when the command in an example's docstring does not run, or the trained network cannot be pruned."""
    launcher = f"torchrun --nproc-per-node {RANKS[name]}" if name in RANKS else "python"
    assert f"    {launcher} examples/{name}.py\n" in (EXAMPLES / f"{name}.py").read_text()
    printed = start_example(name, "--epochs", str(epochs), folder=tmp_path, ranks=RANKS.get(name, 0))
    found = accuracies(printed)
    assert tuple(found) == ("0.00", "0.50", "0.80", "0.90", "0.95")
    assert found["0.00"] > dense
    assert found["0.80"] > pruned
    assert any((tmp_path / "runs" / name).iterdir()), "no checkpoint"


# What happens to SFW inside a framework


@dataclass
class Seen:
    """What the steps of a run were like, and where it left its checkpoints."""

    folder: Path
    steppers: set[type] = field(default_factory=set)
    rates: list[list[float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gauges: list[float] = field(default_factory=list)

    def step(self, optimizer: Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        self.steppers.add(type(optimizer))
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.norms.append(norm.item())
        sets = [(group["constraint"], p) for group in optimizer.param_groups for p in group["params"]]
        self.gauges = [c.gauge(p.detach()) for c, p in sets if not isinstance(c, Unconstrained)]


def run_here(name: str, folder: Path, *options: str) -> Seen:
    """An example's ``main`` in this process, two epochs."""
    seen = Seen(folder)
    handle = register_optimizer_step_post_hook(seen.step)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        for variable, value in OFFLINE.items():
            patch.setenv(variable, value)
        try:
            importlib.import_module(name).main(["--epochs", "2", "--folder", str(folder), *options])
        finally:
            handle.remove()
            _forget_accelerate()
    return seen


def _forget_accelerate() -> None:
    """Accelerate keeps one state for the whole process, with the precision of the first Accelerator."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module", params=IN_ONE_PROCESS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Seen]:
    return request.param, run_here(request.param, tmp_path_factory.mktemp(request.param))


def test_it_is_sfw_that_steps(run: tuple[str, Seen]) -> None:
    """Fails when a framework steps with an optimizer of its own, or more or less often than once a batch."""
    _, seen = run
    assert seen.steppers == {SFW}
    assert len(seen.rates) == 2 * STEPS_OF_AN_EPOCH
    assert max(seen.gauges) <= 1 + 1e-5, "a tensor has left its set: its group has lost it"


def test_the_schedule_moves_the_learning_rate_of_every_group(run: tuple[str, Seen]) -> None:
    """Fails when a scheduler moves a copy of the groups, or the norms' own learning rate is lost on the way."""
    _, seen = run
    for first, last in zip(seen.rates[0], seen.rates[-1], strict=True):
        assert 0 <= last < 0.02 * first
    assert len(set(seen.rates[0])) == 2, "weights have one learning rate, norms and biases another"


def test_gradients_are_clipped_before_the_step(run: tuple[str, Seen]) -> None:
    """Fails when a framework clips after SFW has stepped, or other tensors than SFW's."""
    _, seen = run
    assert max(seen.norms) <= 1 + 1e-4
    assert sum(norm > 0.99 for norm in seen.norms) > 2, "never clipped: the test shows nothing"


# Lightning shuffles in another order after a resume; the next test keeps the order.
@pytest.mark.parametrize("run", [name for name in IN_ONE_PROCESS if name != "lightning_digits"], indirect=True)
def test_a_resumed_run_ends_bitwise_like_an_uninterrupted_one(run: tuple[str, Seen], tmp_path: Path) -> None:
    """Fails when a framework's checkpoint loses some of SFW's state, or loads it into something else."""
    name, seen = run
    first, last = FIRST_AND_LAST[name]
    run_here(name, tmp_path, "--resume", str(seen.folder / first))
    assert_same_state(name, seen.folder / last, tmp_path / last)


def test_lightning_resumes_bitwise_where_the_data_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when ``ckpt_path`` loses some of SFW's state. Lightning's checkpoints hold no random state."""
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint

    monkeypatch.syspath_prepend(EXAMPLES)
    example, data = importlib.import_module("lightning_digits"), importlib.import_module("digits")
    ordered = DataLoader(data.digits()[0], batch_size=64)

    def fit(folder: Path, checkpoint: Path | None) -> None:
        saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=2,
            callbacks=[saving],
            logger=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(example.Digits(), ordered, ckpt_path=checkpoint)

    first, last = FIRST_AND_LAST["lightning_digits"]
    fit(tmp_path / "whole", None)
    fit(tmp_path / "resumed", tmp_path / "whole" / first)
    assert_same_state("lightning_digits", tmp_path / "whole" / last, tmp_path / "resumed" / last)


def test_timm_scales_and_clips_what_sfw_sees() -> None:
    """Fails when SFW takes scaled gradients, or steps before NativeScaler has clipped them."""
    from timm.utils import NativeScaler, dispatch_clip_grad

    images, labels = torch.randn(16, 8), torch.arange(16) % 4
    after = []
    for scaled in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        optimizer = SFW(constrain(net, KSparsePolytope(k_frac=0.1, k_min=2, tau=5.0)), lr=0.5)
        scaler = NativeScaler(device="cpu")
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            if scaled:
                scaler(loss, optimizer, clip_grad=0.1, parameters=net.parameters())
            else:
                loss.backward()
                dispatch_clip_grad(net.parameters(), 0.1)
                optimizer.step()
        after.append(net.state_dict())
    for name, tensor in after[0].items():  # the scale is a power of two, which rounds nothing
        assert torch.equal(tensor, after[1][name]), name
