"""Study files, and what is refused in one."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.run_study import main
from experiments.runs import PlannedRun, check
from experiments.study import read_study
from tests.support.studies import ROOT, write_study


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


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_can_begin(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a field or a configuration is renamed and a study is forgotten."""
    monkeypatch.chdir(ROOT)
    study = read_study(path)
    check([PlannedRun(study, arm, seed=0, runs_dir=tmp_path, threads=1) for arm in study.arms])
