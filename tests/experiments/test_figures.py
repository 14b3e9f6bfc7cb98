"""Which figures are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.run_study import main
from experiments.tables import Row, rows_csv


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
