"""The rows behind the curve and the notes about them."""

from __future__ import annotations

import json

import pytest

from sfw_dist.report import table
from sfw_dist.report.runs import read_runs
from tests.support.report import (
    ACCURACY,
    MakeRun,
    page_of,
    recalibrate,
    rows_of,
)


def test_csv_holds_the_numbers_of_the_files(make_run: MakeRun) -> None:
    """A ratio is inverted, a sparsity is mixed up with another, or a row is lost: checked against hand-made numbers."""
    rows = rows_of(make_run())
    assert [float(row["sparsity"]) for row in rows] == sorted(ACCURACY)
    assert [float(row["top1"]) for row in rows] == list(ACCURACY.values())
    at_90 = rows[2]
    kept = 58 + 7_373 + 128  # of 576, 73,728 and 1,280
    assert float(at_90["achieved_sparsity_prunable"]) == pytest.approx(1 - kept / 75_584)
    assert float(at_90["achieved_sparsity_all"]) == pytest.approx(1 - (kept + 416) / 76_000)
    assert int(at_90["parameters_kept"]) == kept + 416
    assert float(at_90["compression_ratio"]) == pytest.approx(76_000 / (kept + 416))
    assert float(at_90["theoretical_speedup"]) == pytest.approx(75_584 / kept)
    assert (at_90["run"], at_90["optimizer"], at_90["samples"], at_90["split"]) == ("digits_sfw", "sfw", "450", "test")


def test_sparsity_that_a_budget_buys(make_run: MakeRun) -> None:
    """A network that recovers beyond a failure is credited with the later sparsity, or rounding decides 0.98 - 0.97."""
    (run,) = read_runs([make_run(accuracy={0.0: 0.98, 0.5: 0.97, 0.9: 0.5, 0.95: 0.98})])
    assert table.sparsity_within(run, 0.005) == 0.0
    assert table.sparsity_within(run, 0.01) == 0.5
    assert table.sparsity_within(run, 0.5) == 0.95


def test_dense_accuracy_after_training_is_not_of_the_recalibrated_curve(make_run: MakeRun) -> None:
    """Without a result at sparsity 0 a budget would compare statistics as trained with recalibrated ones."""
    run = make_run(accuracy={0.9: 0.9})
    recalibrate(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "eval", "split": "test", "sparsity": 0.0, "top1": 0.96}) + "\n")
    raw, recalibrated = (curve.run for curve in table.curves(read_runs([run])))
    assert (raw.dense_top1, recalibrated.dense_top1) == (0.96, None)


def test_mixed_pruning_is_noted(make_run: MakeRun) -> None:
    """One point of the curve was pruned 2:4 and nobody is told."""
    run = make_run()
    path = run / "prune" / "s0.5000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "2:4"}))
    told = "2:4 × global × magnitude, scope weights; weight × global × magnitude, scope weights"
    assert f"not all pruned in the same way ({told})" in page_of(run)


def test_older_and_newer_words_for_one_pruning_are_one(make_run: MakeRun) -> None:
    """A run that is measured again at more sparsities looks as if it had been pruned in two ways."""
    run = make_run()
    path = run / "prune" / "s0.5000.json"
    new = {"granularity": "weight", "ranking": "global", "criterion": "magnitude"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **new}))
    assert "not all pruned" not in page_of(run)
    assert {row["granularity"] for row in rows_of(run)} == {"weight"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "ranking": "layerwise"}))
    assert "not all pruned in the same way" in page_of(run)
