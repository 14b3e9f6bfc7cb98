"""The examples on two real ranks, as torchrun or the framework starts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.example_runs import (
    accuracies,
    assert_same_distributed,
    assert_same_files,
    assert_same_state,
    run_mains,
    start_example,
)
from tests.support.ranks import run_on_ranks

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


def test_rank_0_saves_a_gpt_alone_and_resuming_repeats_its_steps(tmp_path: Path) -> None:
    """Fails when ``state_dict`` on one rank waits, tied weights lose their set, or ``lr_factor`` is lost on the way."""
    options = ["--steps", "40", "--interval", "20", "--folder"]
    whole, resumed = [*options, str(tmp_path / "whole")], [*options, str(tmp_path / "resumed")]
    resumed += ["--resume", str(tmp_path / "whole" / "step_20.pt")]
    printed, silent = run_on_ranks(run_mains, 2, "gpt_text", [whole, resumed])
    assert silent == ""
    losses = accuracies(printed)
    assert tuple(losses) == ("0.00", "0.50", "0.80", "0.90", "0.95")
    assert losses["0.00"] < 3.6  # 4.8 at the beginning, 3.3 when only the characters' frequencies are known
    (tmp_path / "whole" / "step_20.pt").unlink()
    assert_same_files(tmp_path / "whole", tmp_path / "resumed")
    state = torch.load(tmp_path / "whole" / "step_40.pt", weights_only=True)
    assert torch.equal(state["model"]["head.weight"], state["model"]["tokens.weight"])
    names = [name for group in state["optimizer"]["param_groups"] for name in group["param_names"]]
    assert len(names) == len(state["optimizer"]["state"]) == len(state["model"]) - 1, "tied weights count once"
    assert all(kept["momentum_buffer"].any() for kept in state["optimizer"]["state"].values())


def test_accelerate_shards_by_fsdp2_and_resumes_bitwise(tmp_path: Path) -> None:
    """Fails when SFW does not follow to the parameters that ``prepare`` has put into its groups, or loses state."""
    name, folder = "accelerate_fsdp_digits", tmp_path / "runs" / "accelerate_fsdp_digits"
    printed = start_example(name, *EPOCHS, folder=tmp_path, ranks=2)
    assert accuracies(printed)["0.00"] > 0.35
    start_example(name, *EPOCHS, "--folder", "resumed", "--resume", str(folder / "epoch_0"), folder=tmp_path, ranks=2)
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        assert_same_distributed(folder / "epoch_1" / part, tmp_path / "resumed" / "epoch_1" / part, tmp_path)


def test_a_container_of_optimizers_resumes_on_other_ranks(tmp_path: Path) -> None:
    """Fails when the flat state of SFW beside AdamW lacks something, or loads on as many ranks as wrote it only."""
    options = ["--steps", "40", "--interval", "20", "--folder"]
    resume = ["--resume", str(tmp_path / "whole" / "step_20")]
    whole, again = [*options, str(tmp_path / "whole")], [*options, str(tmp_path / "again"), *resume]
    printed, _ = run_on_ranks(run_mains, 2, "container_digits", [whole, again])
    assert accuracies(printed)["0.00"] > 0.5
    assert_same_distributed(tmp_path / "whole" / "step_40", tmp_path / "again" / "step_40", tmp_path)
    printed, *_ = run_on_ranks(run_mains, 3, "container_digits", [[*options, str(tmp_path / "on 3"), *resume]])
    assert "step 20: loss" not in printed
    assert accuracies(printed)["0.00"] > 0.5
