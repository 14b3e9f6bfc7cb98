"""The examples on two real ranks, as torchrun or the framework starts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.example_runs import accuracies, assert_same_state, start_example

EPOCHS = ("--epochs", "2")


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("accelerate_digits", "epoch_0", "epoch_1"), ("trainer_digits", "checkpoint-11", "checkpoint-22")],
)
def test_two_ranks_save_what_they_hold_together_and_resume_bitwise(
    name: str, first: str, last: str, tmp_path: Path
) -> None:
    """Fails when saving hangs because SFW's state is asked for on one rank, or a rank's share of it is lost."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    printed = start_example(name, *EPOCHS, "--folder", str(whole), folder=tmp_path, ranks=2)
    assert accuracies(printed)["0.80"] > 0.2
    start_example(name, *EPOCHS, "--folder", str(resumed), "--resume", str(whole / first), folder=tmp_path, ranks=2)
    assert_same_state(name, whole / last, resumed / last)


def test_lightning_saves_the_state_of_two_processes(tmp_path: Path) -> None:
    """Fails when ``strategy="ddp"`` hangs in saving, or saves only what rank 0 holds."""
    printed = start_example(
        "lightning_digits", "--devices", "2", *EPOCHS, "--precision", "bf16-mixed", "--folder", ".", folder=tmp_path
    )
    assert accuracies(printed)["0.80"] > 0.4
    state = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert len(state) == 11
    assert all(tensors["step"] == 44 and tensors["momentum_buffer"].any() for tensors in state.values())


def test_fsdp_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    """Fails when a distributed checkpoint of the example loads on as many ranks as have written it only."""
    start_example("fsdp_digits", *EPOCHS, folder=tmp_path, ranks=2)
    checkpoint = tmp_path / "runs" / "fsdp_digits" / "epoch_0"
    printed = start_example("fsdp_digits", *EPOCHS, "--resume", str(checkpoint), folder=tmp_path, ranks=3)
    assert "epoch 1: loss" in printed
    assert "epoch 0: loss" not in printed
    assert accuracies(printed)["0.00"] > 0.3
