"""What frameworks do to an optimizer and its param groups, each by the framework's own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from sfw_dist import SFW, KSparsePolytope, Unconstrained, constrain
from tests.support.example_runs import assert_same_values

pl = pytest.importorskip("pytorch_lightning")


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(32, 6, generator=generator), torch.arange(32) % 3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    return constrain(net, KSparsePolytope(k_frac=0.2, k_min=2, tau=5.0), unconstrained="norm_and_bias")


# Lightning


class Module(pl.LightningModule):
    """A head, and a backbone that some callback or the module itself adds to the optimizer."""

    def __init__(self, *, manual: bool = False) -> None:
        super().__init__()
        layers = network()
        self.backbone, self.head = layers[:2], layers[2:]
        self.automatic_optimization = not manual

    def configure_optimizers(self) -> SFW:
        return SFW(groups_of(self.head), lr=0.1)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            if index == 1:
                optimizer.add_param_group({"params": list(self.backbone.parameters()), "lr": 0.01})
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss


def fit(module: Module, folder: Path, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[*callbacks, pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(data(), batch_size=8), **options)
    return trainer


def test_backbone_finetuning_adds_a_group_without_names(tmp_path: Path) -> None:
    """Fails when Lightning's group is refused, loses its rate, or its checkpoint does not load or resume."""

    class Backbone(pl.callbacks.BackboneFinetuning):
        def finetune_function(self, module: Module, epoch: int, optimizer: SFW) -> None:
            super().finetune_function(module, epoch, optimizer)
            if epoch > self.unfreeze_backbone_at_epoch:  # a resumed run has frozen it again: Lightning's own gap
                self.make_trainable(module.backbone)

    def callback() -> Any:
        return Backbone(1, lambda epoch: 2.0, backbone_initial_ratio_lr=0.1)

    whole, resumed = Module(), Module()
    before = whole.backbone[0].weight.detach().clone()
    trainer = fit(whole, tmp_path / "whole", callback(), epochs=4)
    optimizer = trainer.optimizers[0]
    assert type(optimizer) is SFW
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, pytest.approx(0.04)]
    assert isinstance(optimizer.param_groups[-1]["constraint"], Unconstrained)
    assert not torch.equal(whole.backbone[0].weight, before)

    first = tmp_path / "whole" / "epoch=1.ckpt"
    fit(resumed, tmp_path / "resumed", callback(), epochs=4, ckpt_path=first, weights_only=True)
    assert_same_values(resumed.state_dict(), whole.state_dict())


def test_a_module_adds_a_group_through_lightnings_own_optimizer(tmp_path: Path) -> None:
    """Fails when ``self.optimizers()``, a wrapper of SFW's class, adds to itself what SFW never steps."""
    module = Module(manual=True)
    before = module.backbone[0].weight.detach().clone()
    optimizer = fit(module, tmp_path, epochs=1).optimizers[0]
    assert len(optimizer.param_groups) == 3
    assert module.backbone[0].weight in optimizer.state
    assert not torch.equal(module.backbone[0].weight, before)


# timm


def test_timms_schedules_scale_each_groups_rate() -> None:
    """Fails when ``lr_scale``, timm's layer decay, is lost in a group, or a schedule overwrites it."""
    pytest.importorskip("timm")
    from timm.scheduler import CosineLRScheduler

    ours, theirs = groups_of(network()), [{"params": [nn.Parameter(torch.ones(1))]} for _ in range(3)]
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        one["lr_scale"] = other["lr_scale"] = 0.5**number
    optimizers = (SFW(ours, lr=0.4), SGD(theirs, lr=0.4))
    schedules = [CosineLRScheduler(o, t_initial=6, warmup_t=2, warmup_lr_init=0.01, lr_min=0.02) for o in optimizers]
    for epoch in range(6):
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        assert rates[0] == rates[1]
        assert rates[0][0] == 2 * rates[0][1] == 4 * rates[0][2]
        for schedule in schedules:
            schedule.step(epoch + 1)


def test_timms_layer_decay_groups_take_sets() -> None:
    """Fails when groups by layer, each of several parameters and without names, cannot have one set each."""
    pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    net = network()
    net.pretrained_cfg = {"classifier": "2"}
    groups = param_groups_layer_decay(net, layer_decay=0.5)
    for group in groups:
        if all(p.ndim > 1 for p in group["params"]):
            group["constraint"] = KSparsePolytope(k=4, radius=3.0)
    optimizer = SFW(groups, lr=0.1)
    images, labels = data().tensors
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {p.ndim for group in groups if "constraint" in group for p in group["params"]} >= {2}


# Accelerate


def test_accelerate_prepares_accumulates_and_keeps_groups() -> None:
    """Fails when ``prepare``, which loads the state into the optimizer once, loses sets, options or momentum."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    plain, prepared = network(), network()
    optimizers = [SFW(groups_of(net), lr=0.1) for net in (plain, prepared)]
    images, labels = data().tensors

    def step_plain() -> None:
        optimizers[0].zero_grad()
        (F.cross_entropy(plain(images[:16]), labels[:16]) / 2).backward()
        (F.cross_entropy(plain(images[16:]), labels[16:]) / 2).backward()
        optimizers[0].step()

    step_plain()
    prepared.load_state_dict(plain.state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    try:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, optimizer = accelerator.prepare(prepared, optimizers[1])
        sets = [group["constraint"] for group in optimizer.param_groups]
        assert sets == [group["constraint"] for group in optimizers[0].param_groups]
        for number in range(4):
            half = slice(16 * (number % 2), 16 * (number % 2) + 16)
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(images[half]), labels[half]))
                optimizer.step()
                optimizer.zero_grad()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    for _ in range(2):
        step_plain()
    assert_same_values(prepared.state_dict(), plain.state_dict())
    assert_same_values(optimizers[1].state_dict(), optimizers[0].state_dict())


# Trainer


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_trainer_builds_sfw_and_warns_that_it_has_no_sets(tmp_path: Path) -> None:
    """Fails when Trainer's own groups (weight decay or none) are refused, or nobody says that they have no sets."""
    pytest.importorskip("transformers")
    from accelerate.state import AcceleratorState, GradientState
    from transformers import Trainer, TrainingArguments

    options = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=0.05,
        weight_decay=0.1,
    )
    x, labels = data().tensors
    rows = [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]
    model = WithLoss()
    before = model.net[0].weight.detach().clone()
    try:
        trainer = Trainer(model, options, train_dataset=rows, optimizer_cls_and_kwargs=(SFW, {"lr": 0.05}))
        with pytest.warns(UserWarning, match="no param group has a constraint"):
            trainer.train()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is SFW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert not torch.equal(model.net[0].weight, before)
