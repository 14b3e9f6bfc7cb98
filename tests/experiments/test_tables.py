"""The rows of a study, their means and spreads."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from experiments.tables import read_rows, rows_csv, summarise
from sfw_dist.errors import UserError
from tests.support.studies import rows


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
    """Fails when drops of such a run are measured from another run's dense accuracy."""
    with pytest.raises(UserError, match="a, seed 1, has no row at sparsity 0"):
        summarise([row for row in rows() if (row.arm, row.seed, row.sparsity) != ("a", 1, 0)])
