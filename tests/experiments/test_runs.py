"""The runs of a study: their commands, what is left to run, and how they end."""

from __future__ import annotations

from pathlib import Path

from experiments.runs import Outcome, pending, run_all
from tests.support.studies import ROOT, planned


def test_commands_hold_the_study_s_arguments_and_the_arm_s_over_them(tmp_path: Path) -> None:
    """Fails when an arm's own value is overridden by the study's, or an argument is lost."""
    run = planned(tmp_path, arm=1)
    assert run.train_command() == [
        *("python", "-m", "sfw_dist.train", "--config", str(ROOT / "configs/digits/sgd.yaml"), "--seed", "1"),
        *("--runs_dir", str(tmp_path / "runs"), "--name", "tiny-cram-s1", "--data.workers", "1", "--data.root", "data"),
        *("--train.epochs", "3", "--cram.sparsities", "[0.5, 0.9]", "--cram.dense", "false", "--resume", "auto"),
    ]
    evaluate = ["python", "-m", "sfw_dist.evaluate", str(tmp_path / "runs/tiny-cram-s1"), "--sparsities", "0,0.5"]
    assert run.evaluate_command() == evaluate


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    """A study that was cut off, or has grown, goes on; one that does again what is there takes its time twice."""
    run = planned(tmp_path)
    (run.folder / "prune").mkdir(parents=True)
    assert pending(run) == [run.train_command(), run.evaluate_command()]
    (run.folder / "model.safetensors").touch()
    assert pending(run) == [run.evaluate_command()]
    (run.folder / "prune/s0.0000.json").touch()
    assert pending(run) == [run.evaluate_command("0.5")] and run.evaluate_command()[-1] == "0,0.5"
    (run.folder / "prune/s0.5000.json").touch()
    assert pending(run) == []
    assert run_all([run], jobs=1) == {run: Outcome.DONE}
    assert not run.log.exists()


def test_a_run_that_fails_leaves_the_others_be_and_its_output_in_its_log(tmp_path: Path) -> None:
    """Fails when one broken run ends a study of days, or leaves no trace of why."""
    run, other = planned(tmp_path), planned(tmp_path, arm=1)
    run.folder.mkdir(parents=True)
    (run.folder / "model.safetensors").touch()  # but no config.yaml: the evaluation refuses it
    (other.folder / "prune").mkdir(parents=True)
    for done in ("model.safetensors", "prune/s0.0000.json", "prune/s0.5000.json"):
        (other.folder / done).touch()
    assert run_all([run, other], jobs=1) == {run: Outcome.FAILED, other: Outcome.DONE}
    assert "is not a run's folder" in run.log.read_text()
    assert run.commands_run() == [run.shown(run.evaluate_command())]
