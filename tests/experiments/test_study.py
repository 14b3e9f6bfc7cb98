"""Studies: their files, the commands they make, what is not done twice, and the numbers that are drawn."""

# ruff: noqa: E402
# The benchmarks are scripts beside each other and no package. Their folder comes last on the path, for some of them
# have the names of modules here.

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from experiments.run_study import gather, main
from experiments.runs import Outcome, Planned, check, pending, run_all
from experiments.study import read_study
from experiments.tables import Row, read_rows, rows_csv, summarise
from sfw_dist.errors import UserError

STUDY = {
    "title": "Digits",
    "seeds": [0, 1],
    "sparsities": "0,0.5",
    "arguments": {"data.root": "data", "train.epochs": 2},
    "arms": {
        "sfw": {"label": "SFW", "config": str(ROOT / "configs/digits_cnn.yaml")},
        "cram": {
            "label": "CrAM",
            "config": str(ROOT / "configs/digits_cnn_sgd.yaml"),
            "arguments": {"train.epochs": 3, "cram.sparsities": [0.5, 0.9], "cram.dense": False},
        },
    },
}


def write_study(folder: Path, **changes: object) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


def planned(folder: Path, arm: int = 0) -> Planned:
    study = read_study(write_study(folder))
    return Planned(study, study.arms[arm], seed=1, runs_dir=folder / "runs", threads=1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sparsity": "0.5"}, "unknown key 'sparsity'"),
        ({"arms": {"sfw": {"label": "SFW", "config": "c.yaml", "lr": 1}}}, "arm sfw: unknown key 'lr'"),
        ({"arms": {"sfw": {"label": "SFW"}}}, "arm sfw: no config"),
        ({"arms": {"a/b": {"label": "SFW", "config": "c.yaml"}}}, "'a/b' is part of a folder's name"),
        ({"arms": {}}, "arms is {}"),
        ({"arguments": {"seed": 3}}, "the study sets seed itself"),
        ({"arguments": {"optimizer": {"lr": 1}}}, "by its dotted name"),
        ({"seeds": [0, 0]}, "seeds is [0, 0]"),
        ({"sparsities": "0.5"}, "lack 0"),
        ({"sparsities": "0,1.5"}, "bad sparsities '1.5'"),
    ],
)
def test_a_wrong_study_is_refused_in_one_line(
    changes: dict[str, object], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt key that is passed over trains for hours what nobody asked for."""
    assert main([str(write_study(tmp_path, **changes)), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_arguments_that_the_training_refuses_show_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, arguments={"optimizer.lrr": 1})
    assert main([str(study), "--out", str(tmp_path / "out"), "--runs-dir", str(tmp_path / "runs")]) == 2
    assert "optimizer.lrr" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_can_begin(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a field or a configuration is renamed and a study is forgotten."""
    monkeypatch.chdir(ROOT)
    study = read_study(path)
    check([Planned(study, arm, seed=0, runs_dir=tmp_path, threads=1) for arm in study.arms])


def test_commands_hold_the_study_s_arguments_and_the_arm_s_over_them(tmp_path: Path) -> None:
    run = planned(tmp_path, arm=1)
    assert run.train_command() == [
        *("python", "-m", "sfw_dist.train", "--config", str(ROOT / "configs/digits_cnn_sgd.yaml"), "--seed", "1"),
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
    run, other = planned(tmp_path), planned(tmp_path, arm=1)
    run.folder.mkdir(parents=True)
    (run.folder / "model.safetensors").touch()  # but no config.yaml: the evaluation refuses it
    (other.folder / "prune").mkdir(parents=True)
    for done in ("model.safetensors", "prune/s0.0000.json", "prune/s0.5000.json"):
        (other.folder / done).touch()
    assert run_all([run, other], jobs=1) == {run: Outcome.FAILED, other: Outcome.DONE}
    assert "is not a run's folder" in run.log.read_text()
    assert run.commands_run() == [run.shown(run.evaluate_command())]


def rows() -> list[Row]:
    """Two seeds whose dense accuracies differ by far more than what they lose; the second arm has no BatchNorm."""
    top1 = {("a", 0): (90.0, 87.0), ("a", 1): (80.0, 76.0), ("b", 0): (70.0, 60.0)}
    return [
        Row(
            study="tiny",
            arm=arm,
            label=f"arm {arm}",
            seed=seed,
            sparsity=sparsity,
            compression=1 / (1 - sparsity),
            sparsity_all=sparsity / 3,
            top1=value,
            top1_recalibrated=value + 1 if arm == "a" else None,
            validation_top1=None,
            seconds_train=12.5,
        )
        for (arm, seed), values in top1.items()
        for sparsity, value in zip((0.0, 0.9), values, strict=True)
    ]


def test_rows_come_back_from_their_file_unchanged(tmp_path: Path) -> None:
    """Figures that are drawn anew would differ from the filed ones by rounding."""
    (tmp_path / "runs.csv").write_text(rows_csv(rows()))
    assert read_rows(tmp_path / "runs.csv") == rows()


def test_drops_are_paired_by_seed() -> None:
    """Taken from the mean dense accuracy, the drop's spread would be that of the seeds, ten times its own."""
    dense, pruned = summarise(rows())["a"]
    assert (dense.n, dense.top1.mean, dense.drop.mean, dense.drop.std) == (2, 85, 0, 0)
    assert pruned.top1.mean == 81.5
    assert pruned.top1.std == pytest.approx(11 / math.sqrt(2))
    assert pruned.top1_recalibrated.mean == 82.5
    assert (pruned.drop.mean, pruned.drop_recalibrated.mean) == (3.5, 3.5)
    assert pruned.drop.std == pytest.approx(1 / math.sqrt(2))
    alone = summarise(rows())["b"][1]
    assert (alone.drop.mean, str(alone.top1)) == (10, "60.0")
    assert math.isnan(alone.drop.std) and math.isnan(alone.top1_recalibrated.mean)


def test_a_run_without_its_dense_accuracy_is_refused() -> None:
    with pytest.raises(UserError, match="a, seed 1, has no row at sparsity 0"):
        summarise([row for row in rows() if (row.arm, row.seed, row.sparsity) != ("a", 1, 0)])


def test_draw_makes_everything_from_the_rows_alone(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text(rows_csv(rows()))
    assert main(["--draw", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("runs.csv", "summary.csv", "table.md", "curve.png", "compression.png")
    }
    for name in ("curve.png", "compression.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    assert "| arm a | 85.0 ± 7.1 | 81.5 ± 7.8 |" in table and "| arm b | – | – |" in table
    with (tmp_path / "summary.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert (last["arm"], last["n"], last["drop_mean"], last["drop_std"]) == ("b", "1", "10.0", "")


@pytest.mark.parametrize(
    ("arms", "sparsities", "figures"),
    [
        (9, (0, 0.9), {"curve.png", "compression.png"}),
        (10, (0, 0.9), {"curve.png", "compression.png", "bars.png"}),
        (2, (0,), {"bars.png"}),
    ],
)
def test_the_figures_are_those_that_suit_and_others_go(
    tmp_path: Path, arms: int, sparsities: tuple[float, ...], figures: set[str]
) -> None:
    """Lines cannot tell many arms apart, and one sparsity makes no line; an earlier study's figure would mislead."""
    for name in ("curve.png", "compression.png", "bars.png"):
        (tmp_path / name).write_text("of an earlier study")
    names = [(f"a{i}", f"${i}|") for i in range(arms)]
    rows = [Row("tiny", *name, 0, s, 1 / (1 - s), s, 90, 91, 92, 1) for name in names for s in sparsities]
    (tmp_path / "runs.csv").write_text(rows_csv(rows))
    assert main(["--draw", "--out", str(tmp_path)]) == 0
    drawn = list(tmp_path.glob("*.png"))
    assert {path.name for path in drawn} == figures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_draw_names_a_file_that_is_none_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--draw", "--out", str(tmp_path)]) == 2
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    assert main(["--draw", "--out", str(tmp_path)]) == 2
    (tmp_path / "runs.csv").write_text(rows_csv(rows()).replace("90.0", "ninety"))
    assert main(["--draw", "--out", str(tmp_path)]) == 2
    missing, columns, value = capsys.readouterr().err.splitlines()
    assert "does not exist" in missing and "['a', 'b']" in columns and "line 2" in value and "ninety" in value


def test_gathering_takes_rows_logs_and_commands_from_the_runs(tmp_path: Path) -> None:
    """From a run's folder as training and evaluation leave it, with one sparsity more than the study has."""
    run = planned(tmp_path)
    (run.folder / "prune").mkdir(parents=True)
    (run.folder / "config.yaml").write_text("name: x\n")
    epochs = [{"event": "epoch", "epoch": n, "seconds": 2.5, "validation_top1": n / 4} for n in (1, 2)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    for sparsity, top1 in ((0.0, 0.75), (0.3, 0.7), (0.5, 0.5)):
        (run.folder / f"prune/s{sparsity:.4f}.json").write_text(json.dumps(result(sparsity, top1)))
    gather(run.study, [run], tmp_path / "out")

    dense, pruned = read_rows(tmp_path / "out/runs.csv")
    assert dense == Row("tiny", "sfw", "SFW", 1, 0.0, 1.0, 0.0, 75.0, 87.5, 50.0, 5.0)
    assert pruned == Row("tiny", "sfw", "SFW", 1, 0.5, 2.0, 0.25, 50.0, 75.0, 50.0, 5.0)
    for name in ("config.yaml", "metrics.jsonl"):
        assert (tmp_path / "out/logs/tiny-sfw-s1" / name).read_bytes() == (run.folder / name).read_bytes()
    commands = (tmp_path / "out/commands.txt").read_text().splitlines()
    assert commands == [run.shown(run.train_command()), run.shown(run.evaluate_command())]
    assert read_study(tmp_path / "out/tiny.yaml") == run.study


def result(sparsity: float, top1: float) -> dict[str, Any]:
    """As ``prune/s*.json`` has it, of a network whose prunable weights are half of all."""
    return {
        "sparsity": sparsity,
        "achieved_sparsity_all": sparsity / 2,
        "achieved_sparsity_prunable": sparsity,
        **{"scope": "weights", "kind": "global", "split": "test", "samples": 100, "seed": 1},
        **{"top1": top1, "top5": 1.0, "loss": 1.0},
        **{"top1_recalibrated": (1 + top1) / 2, "top5_recalibrated": 1.0, "loss_recalibrated": 1.0},
        **{"parameters_total": 100, "parameters_kept": 100, "flops_dense": 10, "flops": 10, "layers": []},
    }
