"""Examples of fine-tuning, each run briefly in this process: what must not move, and what a resumed run must repeat."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfw_dist import SFW
from tests.support.example_runs import EXAMPLES, accuracies, assert_same_files, assert_same_values


@pytest.fixture(autouse=True)
def _examples_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


# LoRA


@pytest.mark.parametrize("base", ["float", "int8"])
def test_lora_trains_the_adapters_and_nothing_else(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when the frozen base moves or has state, whatever its type, or a resumed run ends otherwise."""
    example = importlib.import_module("lora_digits")
    watched: list[tuple[SFW, dict[str, Tensor]]] = []
    frozen: set[torch.dtype] = set()
    build, train = example.optimizer_of, example.train_epoch

    def watch(net: nn.Module) -> SFW:
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer: SFW = build(net)
        watched.append((optimizer, before))
        frozen.update(p.dtype for p in net.parameters() if not p.requires_grad)
        return optimizer

    def train_and_look(net: nn.Module, *others: Any) -> float:
        loss: float = train(net, *others)
        optimizer, before = watched[-1]
        for name, p in net.named_parameters():
            assert torch.equal(p, before[name]) != p.requires_grad, name
            assert (p in optimizer.state) == p.requires_grad, name
        return loss

    monkeypatch.setattr(example, "optimizer_of", watch)
    monkeypatch.setattr(example, "train_epoch", train_and_look)
    options = ["--epochs", "4", *(["--int8"] if base == "int8" else [])]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    example.main([*options, "--folder", str(whole)])
    assert (torch.int8 in frozen) == (base == "int8")
    assert accuracies(capsys.readouterr().out)["0.50"] > 0.5

    example.main([*options, "--folder", str(resumed), "--resume", str(whole / "epoch_1")])
    assert_same_files(whole / "epoch_3", resumed / "epoch_3")


# Lightning


def saved(folder: Path, epoch: int) -> dict[str, Any]:
    """A checkpoint; it must load as plain values and tensors."""
    state: dict[str, Any] = torch.load(folder / f"epoch={epoch}.ckpt", weights_only=True)
    return state


def test_a_backbone_joins_and_a_run_resumes_before_and_after_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when a frozen backbone moves, joins without its sets, or BackboneFinetuning's checkpoint does not load."""
    example = importlib.import_module("lightning_finetuning_digits")
    options = ["--epochs", "4", "--join", "2"]
    whole = tmp_path / "whole"
    example.main([*options, "--folder", str(whole)])
    assert accuracies(capsys.readouterr().out)["0.80"] > 0.3

    weights = [saved(whole, epoch)["current_model_state"] for epoch in range(4)]
    for name in (name for name in weights[0] if name.startswith("backbone")):
        assert torch.equal(weights[0][name], weights[1][name]), name
        assert not torch.equal(weights[1][name], weights[2][name]), name
    groups = saved(whole, 3)["optimizer_states"][0]["param_groups"]
    assert [len(saved(whole, epoch)["optimizer_states"][0]["param_groups"]) for epoch in (1, 2)] == [2, len(groups)]
    assert sum(group["constraint"]["kind"] != "unconstrained" for group in groups) == 4

    for first in (0, 2):
        folder = tmp_path / f"from {first}"
        example.main([*options, "--folder", str(folder), "--resume", str(whole / f"epoch={first}.ckpt")])
        for key in ("state_dict", "current_model_state"):
            assert_same_values(saved(folder, 3)[key], saved(whole, 3)[key], key)
        states = [saved(place, 3)["optimizer_states"][0]["state"] for place in (folder, whole)]
        assert_same_values(*states)


def test_averaged_weights_lie_in_the_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when Lightning's SWA, which takes over the schedule, loses a group or leaves a set."""
    example = importlib.import_module("lightning_finetuning_digits")
    models = []
    monkeypatch.setattr(example, "sweep", lambda model, *others: models.append(model) or [])
    example.main(["--epochs", "3", "--join", "1", "--average", "swa", "--folder", str(tmp_path)])
    rates = [group["lr"] for group in saved(tmp_path, 2)["optimizer_states"][0]["param_groups"]]
    assert rates != [0.01, 0.02, 0.01, 0.01, 0.01, 0.02], "SWA's schedule moved nothing"
    for group in [*models[0].groups("backbone"), *models[0].groups("head")]:
        for name, p in group["params"]:
            assert group["constraint"].gauge(p.detach()) <= 1 + 1e-6, name
