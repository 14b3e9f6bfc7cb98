"""Sparse-training methods: GMP, CrAM and sampled sparsities, by hand and in whole runs that resume."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from sfw_dist.config import Config, CramConfig, GMPConfig, OptimizerConfig, SampledConfig
from sfw_dist.errors import UserError
from sfw_dist.evaluate.sweep import sweep_run
from sfw_dist.train import trainer as training
from sfw_dist.train.__main__ import main
from sfw_dist.train.k_schedule import k_frac
from sfw_dist.train.run_folder import RunFolder
from sfw_dist.train.sparse_training import (
    GMP,
    CrAM,
    SampledSparsity,
    TrainingMethod,
    build_training_method,
    gmp_sparsity,
)
from sfw_dist.train.strategies import build_strategy
from tests.support.pruning import compute_masks
from tests.support.training import ONE_PROCESS, baselines, small_config

STEPS = 20
SGD = OptimizerConfig(name="sgd", lr=0.1, weight_decay=0.01)
CUT = Config(
    name="x",
    method="sampled",
    sampled=SampledConfig([0.0, 0.6]),
    optimizer=replace(SGD, weight_decay=0.0, momentum=0.0),
)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


def opened(config: Config, model: nn.Module | None = None) -> TrainingMethod:
    return build_training_method(build_strategy(model or network(), config, ONE_PROCESS), config, STEPS)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 4, 4, generator=generator), torch.randint(3, (8,), generator=generator)


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for name, p in model.named_parameters() if p.ndim == 2)


def gmp(**options: Any) -> Config:
    return Config(name="x", method="gmp", gmp=GMPConfig(**options), optimizer=SGD)


def step_that_draws(sparsity: float, config: Config) -> int:
    method = opened(config)
    assert isinstance(method, SampledSparsity)
    return next(step for step in range(100) if method.sparsity(step) == sparsity)


# ------------------------------------------------------------------------------------------- GMP


def test_the_sparsity_is_zhu_and_guptas_cubic() -> None:
    """Fails when it begins, rises or ends elsewhere."""
    rule = GMPConfig(sparsity=0.9, initial=0.2, begin=0.25, end=0.75)
    assert [gmp_sparsity(rule, step, 100) for step in (0, 24, 25, 50, 75, 99)] == pytest.approx(
        [0, 0, 0.2, 0.9 - 0.7 / 8, 0.9, 0.9]
    )
    assert gmp_sparsity(rule, 75, 100) == 0.9  # exactly, for counts are exact


def test_weights_are_removed_on_time_and_never_come_back() -> None:
    """Fails when pruning happens at other steps, removed weights grow again, or the end is not what was asked for."""
    config = gmp(sparsity=0.9, begin=0.25, end=0.7, every=6)
    model = network()
    method = opened(config, model)
    total, removed, before = 16 * 12 + 12 * 3, [], torch.zeros(0, dtype=torch.bool)
    for step in range(STEPS):
        method.train_step(*batch(step), step)
        flat = torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim == 2])
        if len(before):
            assert flat[before].count_nonzero() == 0
        before = flat == 0
        removed.append(zeros(model))
    # Prunings after 5 and 11 of 20 steps, and after the 14th, which ends it.
    expected = {done: round(gmp_sparsity(config.gmp, done, STEPS) * total) for done in (5, 11, 14)}
    last = 0
    for done in range(1, STEPS + 1):
        last = expected.get(done, last)
        assert removed[done - 1] == last, done
    assert last == round(0.9 * total) and method.log_values() == {"sparsity": pytest.approx(0.9, abs=1 / total)}


def test_what_is_kept_goes_on_training() -> None:
    """Fails when masks freeze the weights that are left."""
    model = network()
    method = opened(gmp(begin=0.0, end=0.1, every=1), model)
    for step in range(3):
        method.train_step(*batch(step), step)
    kept = {name: p.detach() != 0 for name, p in model.named_parameters() if p.ndim == 2}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    method.train_step(*batch(9), 9)
    for name, p in model.named_parameters():
        assert name not in kept or bool((p.detach() != before[name])[kept[name]].any())


def test_a_weight_that_is_zero_by_chance_may_still_move_after_a_resume() -> None:
    """Fails when masks are made anew from the zeros: the restored network would keep another weight at zero."""
    model = network()
    first = opened(gmp(begin=0.0, end=0.1, every=1), model)
    for step in range(3):
        first.train_step(*batch(step), step)
    again = opened(gmp(begin=0.0, end=0.1, every=1))
    again.load({"model.0.weight": torch.zeros(1), **first.tensors()})
    mine, theirs = first.tensors(), again.tensors()
    assert mine.keys() == theirs.keys() == {"method.mask.1.weight", "method.mask.4.weight"}
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# ---------------------------------------------------------------------------------- CrAM


@pytest.mark.parametrize("dense", [True, False], ids=["plus", "plain"])
def test_a_step_is_the_papers(dense: bool) -> None:
    """Fails when the gradient is taken at another point, the mask is left out, or the dense one is not added."""
    cram = CramConfig(rho=0.3, sparsities=[0.6], dense=dense)
    model = network()
    method = opened(Config(name="x", method="cram", cram=cram, optimizer=replace(SGD, weight_decay=0.0)), model)
    images, labels = batch(0)
    twin = network().train()

    def gradient() -> dict[str, Tensor]:
        loss = F.cross_entropy(twin(images), labels)
        return dict(zip(names, torch.autograd.grad(loss, list(twin.parameters())), strict=True))

    names = [name for name, _ in twin.named_parameters()]
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    g = gradient()
    buffers = {name: b.clone() for name, b in twin.named_buffers()}  # after the dense pass alone
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.add_(0.3 * g[name])
        masks = compute_masks(twin, 0.6)
        for name, p in twin.named_parameters():
            p.mul_(masks.get(name, torch.ones(())))
    h = {name: x * masks.get(name, torch.ones(())) for name, x in gradient().items()}

    method.train_step(images, labels, 0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), start[name] - 0.1 * (h[name] + (g[name] if dense else 0)))
    for name, b in model.named_buffers():
        torch.testing.assert_close(b, buffers[name])


def test_each_step_draws_a_sparsity_that_step_and_seed_decide() -> None:
    """Fails when a resumed run, or another rank, draws another; or one of them is never drawn."""
    engine = build_strategy(network(), Config(name="x", optimizer=SGD), ONE_PROCESS)
    draws = [[CrAM(engine, CramConfig(), seed).sparsity(step) for step in range(60)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert all(15 <= draws[0].count(sparsity) <= 25 + 5 for sparsity in (0.5, 0.7, 0.9))


@pytest.mark.parametrize("config", [CUT, Config(name="x", method="cram", optimizer=SGD)], ids=["sampled", "cram"])
def test_frozen_parameters_stay(config: Config) -> None:
    model = network()
    frozen = next(model.parameters()).requires_grad_(False)
    before = frozen.detach().clone()
    opened(config, model).train_step(*batch(0), step_that_draws(0.6, config) if config is CUT else 0)
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("config", [CUT, Config(name="x", method="cram", optimizer=SGD)], ids=["sampled", "cram"])
def test_a_step_that_fails_leaves_the_dense_network(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when Ctrl-C, or a batch that does not fit, leaves the network pruned for good."""
    model = network()
    method = opened(config, model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients, calls = method._strategy.gradients, 0

    def interrupted(images: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        loss = gradients(images, labels)
        if config is CUT or calls == 2:  # CrAM's first gradients are the dense network's
            assert zeros(model) > 0, "the test interrupts too early"
            raise KeyboardInterrupt
        before.update({name: buffer.clone() for name, buffer in model.named_buffers()})
        return loss

    monkeypatch.setattr(method._strategy, "gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        method.train_step(*batch(0), step_that_draws(0.6, config) if config is CUT else 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# ----------------------------------------------------------------------------------------- sampled sparsities


def test_a_step_trains_the_network_that_was_drawn() -> None:
    """Fails when the gradient is the dense network's, a removed weight moves, or its statistics are averaged in."""
    step = step_that_draws(0.6, CUT)
    images, labels = batch(step)
    model, twin = network(), network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        masks = compute_masks(twin, 0.6)
        for name, mask in masks.items():
            twin.get_parameter(name).mul_(mask)
    expected_loss = F.cross_entropy(twin(images), labels)
    expected_loss.backward()

    loss = opened(CUT, model).train_step(images, labels, step)
    assert loss == expected_loss.detach()
    for name, p in model.named_parameters():
        gradient = twin.get_parameter(name).grad
        assert gradient is not None
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * gradient * masks.get(name, torch.ones(())))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_a_step_that_draws_zero_is_a_plain_one() -> None:
    """Fails when BatchNorm's running statistics are never those of the dense network, or a weight is left out."""
    step = step_that_draws(0.0, CUT)
    models = network(), network()
    for model, config in zip(models, (CUT, replace(CUT, method="plain")), strict=True):
        opened(config, model).train_step(*batch(step), step)
    mine, theirs = (model.state_dict() for model in models)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert mine["2.num_batches_tracked"] == 1


def test_what_is_named_twice_is_drawn_twice_as_often() -> None:
    method = opened(replace(CUT, sampled=SampledConfig([0.0, 0.0, 0.9])))
    assert isinstance(method, SampledSparsity)
    assert 170 < [method.sparsity(step) for step in range(300)].count(0.0) < 230


def test_plain_is_the_strategys_own_step() -> None:
    assert type(opened(Config(name="x", optimizer=SGD))) is TrainingMethod
    assert type(opened(gmp())) is GMP


# ------------------------------------------------------------------------------------------------ whole runs


def events(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("what", baselines())
def test_an_interrupted_run_goes_on_bitwise(
    what: str, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the second of three epochs. Fails when masks, K, draws or AdaGrad's sums are lost."""
    config = replace(small_config(tmp_path / "runs", digits, epochs=3), **baselines()[what])
    whole = replace(config, name="whole")
    assert training.train(whole, ONE_PROCESS) == 0
    # Whose step is interrupted: a class that has a train_step of its own takes it in place of the plain one.
    stepping = {"cram": CrAM, "sampled": SampledSparsity}.get(config.method, TrainingMethod)
    original: Callable[..., Tensor] = stepping.train_step

    def train_step(self: TrainingMethod, images: Tensor, labels: Tensor, step: int) -> Tensor:
        if step == 13:
            signal.raise_signal(signal.SIGINT)
        return original(self, images, labels, step)

    with monkeypatch.context() as patch:
        patch.setattr(stepping, "train_step", train_step)
        assert training.train(config, ONE_PROCESS) == 130
    assert training.train(config, ONE_PROCESS, resume=True) == 0
    mine, theirs = (load_file(c.run_dir / "model.safetensors") for c in (config, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    losses = [[e["train_loss"] for e in events(c) if e["event"] == "epoch"] for c in (config, whole)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


def test_a_run_folder_of_version_0_1_0_is_resumed(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when config.yaml with `method: gradual`, or the names in its checkpoints, are no longer understood."""
    config = replace(small_config(tmp_path / "runs", digits, epochs=2), **baselines()["gmp"])
    whole = replace(config, name="whole")
    assert training.train(whole, ONE_PROCESS) == 0
    original = TrainingMethod.train_step

    def train_step(self: TrainingMethod, images: Tensor, labels: Tensor, step: int) -> Tensor:
        if step == 13:
            signal.raise_signal(signal.SIGINT)
        return original(self, images, labels, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingMethod, "train_step", train_step)
        assert training.train(config, ONE_PROCESS) == 130
    file = config.run_dir / "config.yaml"
    saved = yaml.safe_load(file.read_text())
    saved["method"], saved["gradual"] = "gradual", saved.pop("gmp")
    saved["gradual"]["kind"] = saved["gradual"].pop("ranking")
    file.write_text(yaml.safe_dump(saved))
    assert main(["--config", str(file), "--resume", "auto"]) == 0
    mine, theirs = (load_file(c.run_dir / "model.safetensors") for c in (config, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_records_tell_k_and_sparsity(tmp_path: Path, digits: Path) -> None:
    """Fails when a curve cannot say with which K, or how many weights, its epochs trained."""
    found: dict[str, list[float]] = {}
    for what, key in (("k_schedule", "k_frac"), ("gmp", "sparsity")):
        config = replace(small_config(tmp_path / "runs", digits, what, epochs=3), **baselines()[what])
        assert training.train(config, ONE_PROCESS) == 0
        found[key] = [e[key] for e in events(config) if e["event"] == "epoch"]
    assert found["k_frac"] == pytest.approx([0.2, 0.1, 0.05])
    assert found["sparsity"][-1] == pytest.approx(0.9, abs=1e-3) and found["sparsity"] == sorted(found["sparsity"])


def test_the_sets_of_a_run_follow_its_epochs(tmp_path: Path, digits: Path) -> None:
    """Fails when the record tells of a K that the optimizer never had."""
    config = replace(small_config(tmp_path / "runs", digits, epochs=3), **baselines()["k_schedule"])
    assert training.train(config, ONE_PROCESS) == 0
    weights = load_file(config.run_dir / "model.safetensors")
    for epoch in (1, 2):
        (state,) = (config.run_dir / "checkpoints").glob(f"epoch_{epoch + 1:04d}.*/state.json")
        fraction = k_frac(config.optimizer.k_schedule, config.optimizer.constraint.k_frac, epoch, 3)
        for group in json.loads(state.read_text())["options"]:
            n = weights[group["param_names"][0]].numel()
            assert group["constraint"]["k"] == min(max(10, int(fraction * n)), n)


def test_a_network_trained_by_gmp_is_measured_as_others_are(tmp_path: Path, digits: Path) -> None:
    """Fails when cutting it to its own sparsity changes it: its zeros are what magnitude pruning removes."""
    config = replace(small_config(tmp_path / "runs", digits, epochs=3), **baselines()["gmp"])
    assert training.train(config, ONE_PROCESS) == 0
    dense, cut = sweep_run(RunFolder(config.run_dir), ONE_PROCESS, sparsities=[0.0, 0.9])
    assert (dense["top1"], dense["loss"]) == (cut["top1"], cut["loss"])


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("method", ["gmp", "cram"])
def test_a_diverging_run_says_what_to_do(method: Any) -> None:
    """Fails when weights that are NaN are blamed on a checkpoint, as they are after a training."""
    config = Config(name="x", method=method, gmp=GMPConfig(begin=0.0, every=1), optimizer=SGD)
    model = network()
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match=r"^1\.weight holds NaN, which has no magnitude: lower optimizer\.lr$"):
        opened(config, model).train_step(*batch(0), 0)
