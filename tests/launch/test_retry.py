"""What has failed is listed and submitted again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import collect, job, prune_array, retry, train
from sfw_dist.train.run_folder import RunFolder


def test_what_failed_here_is_listed_and_tried_again(
    file: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed task goes unnoticed; or everything is computed again for its sake."""
    assert train.main(["--config", str(file), "--cluster", "debug"]) == 0

    def broken_for_half(name: str) -> Callable[..., Any]:
        whole = getattr(job, name)

        def evaluate(run: RunFolder, world: object, *, sparsities: list[float], **options: Any) -> Any:
            if sparsities == [0.5]:
                raise RuntimeError("the node died")
            return whole(run, world, sparsities=sparsities, **options)

        return evaluate

    with monkeypatch.context() as patch:
        patch.setattr(job, "evaluate", broken_for_half("evaluate"))
        with pytest.raises(RuntimeError, match="the node died"):
            prune_array.main([str(run.path), "--sparsities", "0.2,0.5", "--cluster", "debug"])
    capsys.readouterr()
    assert collect.main([str(run.path), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem.startswith("missing: sparsity 0.5 (task 1 did not finish): see ")
    before = (run.prune / "s0.2000.json").stat().st_mtime_ns
    (again,) = retry.retry(run)
    assert again.tasks == [[0.5]] and again.is_finished(0)
    assert collect.main([str(run.path)]) == 0
    assert (run.prune / "s0.2000.json").stat().st_mtime_ns == before
    assert retry.retry(run) == []
