"""A tiny study, and rows of results, for the tests of experiments/."""

from __future__ import annotations

from pathlib import Path

import yaml

from experiments.runs import PlannedRun
from experiments.study import read_study
from experiments.tables import Row

ROOT = Path(__file__).parents[2]

STUDY = {
    "title": "Digits",
    "seeds": [0, 1],
    "sparsities": "0,0.5",
    "arguments": {"data.root": "data", "train.epochs": 2},
    "arms": {
        "sfw": {"label": "SFW", "config": str(ROOT / "configs/digits/sfw.yaml")},
        "cram": {
            "label": "CrAM",
            "config": str(ROOT / "configs/digits/sgd.yaml"),
            "arguments": {"train.epochs": 3, "cram.sparsities": [0.5, 0.9], "cram.dense": False},
        },
    },
}


def write_study(folder: Path, **changes: object) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


def planned(folder: Path, arm: int = 0) -> PlannedRun:
    study = read_study(write_study(folder))
    return PlannedRun(study, study.arms[arm], seed=1, runs_dir=folder / "runs", threads=1)


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
