"""What a sweep has measured, as text, HTML, CSV and a figure."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib
import pytest

from sfw_dist.errors import MissingExtraError, UserError
from sfw_dist.pruning import Curve, CurvePoint


def _curve(*, recalibrated: bool = True, name: str = "top1") -> Curve:
    return Curve(
        [
            CurvePoint(
                sparsity,
                prunable_total=1000,
                prunable_kept=1000 - int(1000 * sparsity),
                parameters_total=1234,
                parameters_kept=1234 - int(1000 * sparsity),
                samples=300,
                metrics={name: 1 - sparsity, "loss": 1e6 * sparsity},
                recalibrated={name: 1 - sparsity / 3, "loss": 1e-9} if recalibrated else None,
            )
            for sparsity in (0.0, 0.9375)
        ]
    )


def test_the_table_shows_each_sparsity_in_a_line() -> None:
    """Fails when columns do not stand below their names, or small and large numbers are shown as 0 or as 12 digits."""
    assert _curve().table().splitlines() == [
        "sparsity  parameters kept    top1       loss  top1, recalibrated  loss, recalibrated",
        "       0            1,234  1.0000     0.0000              1.0000           1.000e-09",
        "  0.9375              297  0.0625  9.375e+05              0.6875           1.000e-09",
    ]
    assert _curve(recalibrated=False).table().splitlines()[2] == "  0.9375              297  0.0625  9.375e+05"
    assert repr(_curve()).endswith(_curve().table())


def test_points_and_rows() -> None:
    curve = _curve()
    assert len(curve) == 2 and curve[-1] is list(curve)[1] and len(curve[:1]) == 1
    assert isinstance(curve[:1], Curve)
    assert curve.rows[1] == {
        "sparsity": 0.9375,
        "prunable_total": 1000,
        "prunable_kept": 63,
        "parameters_total": 1234,
        "parameters_kept": 297,
        "samples": 300,
        "top1": 0.0625,
        "loss": 937500.0,
        "top1_recalibrated": 0.6875,
        "loss_recalibrated": 1e-9,
    }
    assert "top1_recalibrated" not in _curve(recalibrated=False).rows[0]


def test_csv_has_every_digit(tmp_path: Path) -> None:
    """Fails when a reader gets rounded numbers, or a full disk leaves half a file."""
    curve, path = _curve(name="a,b"), tmp_path / "curve.csv"
    curve.to_csv(path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{key: float(value) for key, value in row.items()} for row in rows] == curve.rows
    assert path.read_text().count("\n") == 3 and b"\r" not in path.read_bytes()
    curve[:0].to_csv(str(path))
    assert path.read_text().startswith("sparsity,") and list(tmp_path.iterdir()) == [path]


def test_html_is_a_table_of_the_same_cells() -> None:
    """Fails when the name of a metric becomes markup in a notebook."""
    page = _curve(name="<b>&")._repr_html_()
    assert "<th>&lt;b&gt;&amp;, recalibrated</th>" in page and "<b>" not in page
    assert page.count("<tr>") == 3 and "<td>9.375e+05</td>" in page


def test_plot_draws_both_lines() -> None:
    """Fails when the recalibrated numbers are drawn as those before, or a window opens."""
    matplotlib.use("agg")
    curve = _curve()
    ax = curve.plot()
    trained, again = ax.get_lines()
    assert trained.get_xydata().tolist() == [[0.0, 1.0], [0.9375, 0.0625]]
    assert again.get_xydata().tolist() == [[0.0, 1.0], [0.9375, 0.6875]]
    assert trained.get_linestyle() == "--" and again.get_linestyle() == "-" and ax.get_ylabel() == "top1"
    assert _curve(recalibrated=False).plot(ax, metric="loss", label="SGD") is ax
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "top1, BatchNorm as trained",
        "top1, recalibrated",
        "SGD",
    ]
    matplotlib.pyplot.close("all")
    for some in (curve, curve[:0]):
        with pytest.raises(UserError, match=r"no metric 'f1' in this curve: choose one of (top1, loss|none)"):
            some.plot(metric="f1")


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a bare install ends in a traceback."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with pytest.raises(MissingExtraError, match=r"Curve.plot needs matplotlib: pip install 'sfw-dist\[train\]'"):
        _curve().plot()
