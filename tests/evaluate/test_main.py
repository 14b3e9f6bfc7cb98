"""The command: its options, its output and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sfw_dist.evaluate.__main__ import main
from sfw_dist.train.run_folder import RunFolder


def test_command_prints_json(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """A list of sparsities on the command line is not the one that is measured."""
    assert main([str(run.path), "--sparsities", "0.5,0.9:0.92:0.01", "--json"]) == 0
    assert [r["sparsity"] for r in json.loads(capsys.readouterr().out)] == [0.5, 0.9, 0.91, 0.92]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["{missing}"], "not a run's folder"),
        (["{run}", "--sparsities", "90"], "90"),
        (["{run}", "--sparsities", "0.9", "--granularity", "2:4"], "0.5"),
        (["{run}", "--recalibrate", "-1"], "recalibrate must be at least 0, got -1"),
        (["{run}", "--max-drop", "100"], "[0, 100) points"),
        (["{run}", "--max-drop", "nan"], "write 1.0 for one point"),
        (["{run}", "--max-drop", "1", "--sparsities", "0.9"], "leave --sparsities out"),
        (["{run}", "--max-drop", "1", "--granularity", "2:4"], "write --granularity weight"),
        (["{run}", "--granularity", "rank", "--ranking", "layerwise"], "write ranking global"),
        (["{run}", "--kind", "filters", "--ranking", "layerwise"], "leave kind out"),
        (["{run}", "--sparsities", "0.99991,0.99992"], "four decimals"),
        (["{run}", "--data-root", "{missing}"], "not prepared"),
    ],
)
def test_bad_input_is_one_line(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    """A traceback, or a folder that is half written."""
    filled = [a.format(run=run.path, missing=tmp_path / "missing") for a in arguments]
    assert main(filled) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and part in error
    assert not list(run.prune.glob("*"))


def test_a_network_without_batchnorm_is_measured_once_and_told(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails, or a second curve that repeats the first looks as if recalibration were worth nothing."""

    def without(*_: Any, **__: Any) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

    monkeypatch.setattr("sfw_dist.evaluate.pruned_models.build_model", without)
    monkeypatch.setattr(RunFolder, "load_weights", lambda _: without().state_dict())
    assert main([str(run.path), "--sparsities", "0.5", "--json"]) == 0
    printed = capsys.readouterr()
    (result,) = json.loads(printed.out)
    assert result["bn_layers"] == 0 and not result["bn_recalibrated"] and result["top1_recalibrated"] is None
    assert printed.err == "note: the network has no BatchNorm, so nothing was recalibrated\n"


@pytest.mark.parametrize(
    ("new", "old"),
    [
        (["--granularity", "rank"], ["--kind", "low_rank"]),
        (["--granularity", "filter", "--ranking", "layerwise"], ["--kind", "filters-layerwise"]),
    ],
    ids=str,
)
def test_the_older_words_are_accepted(
    run: RunFolder, capsys: pytest.CaptureFixture[str], new: list[str], old: list[str]
) -> None:
    """``--kind`` means something else than the new words for it; or two prunings mix in one folder."""
    printed = []
    for words in (new, old):
        assert main([str(run.path), "--sparsities", "0.5", *words, "--json"]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1] and printed[0][0]["kind"] == old[1]
    assert main([str(run.path), "--sparsities", "0.5", "--kind", "global"]) == 2
    assert " ".join(new) in capsys.readouterr().err
