"""The page: what a reader sees must be what the files say."""

from __future__ import annotations

import json
from pathlib import Path

from sfw_dist.report import figures
from sfw_dist.report.runs import read_runs
from sfw_dist.report.write import write_report
from tests.support.report import (
    FIGURES,
    MakeRun,
    Parsed,
    page_of,
    pruning_result,
    recalibrate,
    rows_of,
)

PRUNING = "weight × global × magnitude, scope weights"


def test_tables_and_csv_hold_both_accuracies(make_run: MakeRun) -> None:
    """An accuracy stands in the other's row; a budget is counted from the dense accuracy of the other curve."""
    run = make_run(accuracy={0.0: 0.95, 0.5: 0.94, 0.9: 0.93})
    recalibrate(run, gain=0.03, top1_recalibrated=0.96)
    cells = Parsed(page_of(run)).cells
    assert cells[0] == ["Run", "Optimizer", "Pruning", "BatchNorm", "Dense", "50 %", "90 %"]
    assert cells[1] == [
        "digits_sfw",
        "sfw",
        PRUNING,
        "as trained",
        "95.0",
        "94.0",
        "93.0",
    ]
    assert cells[2][3:] == ["recalibrated", "96.0", "96.0", "96.0"]
    assert ["digits_sfw", "as trained", "0 %", "50 %", "90 %", "90 %"] in cells
    assert ["digits_sfw", "recalibrated", *["90 %"] * 4] in cells
    row = rows_of(run)[2]
    assert (row["top1"], row["top1_recalibrated"], row["bn_recalibrated"]) == ("0.93", "0.96", "True")
    assert (row["loss_recalibrated"], row["recalibration_batches"]) == ("0.05", "9")


def test_files_from_before_recalibration_are_read(make_run: MakeRun) -> None:
    """An old run cannot be reported any more, has an empty second curve, or takes the other's away."""
    old, new, mixed, plain = make_run("old"), make_run("new"), make_run("mixed"), make_run("plain")
    (row,) = {(row["bn_recalibrated"], row["top1_recalibrated"]) for row in rows_of(old)}
    assert row == ("False", "")
    assert "not recalibrated" not in page_of(old) and "BatchNorm</th>" not in page_of(old)
    recalibrate(new)
    recalibrate(mixed)
    recalibrate(plain, top1_recalibrated=None, bn_layers=0)
    path = mixed / "prune" / "s0.9000.json"
    path.write_text(json.dumps(pruning_result(0.9, 0.5)))
    path = mixed / "prune" / "s0.5000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recalibration_batches": 2}))
    assert len(figures.draw_curve(read_runs([old, new])).axes[0].get_lines()) == 2 + 3
    text = page_of(old, new, mixed, plain)
    assert "old: BatchNorm was not recalibrated anywhere." in text and "new: BatchNorm" not in text
    assert "mixed: BatchNorm was not recalibrated at 90 %." in text
    assert "mixed: BatchNorm was recalibrated over different numbers of batches (2, 9)." in text
    assert "plain: the network has no BatchNorm to recalibrate." in text


def test_the_commands_repeat_the_run_on_as_many_ranks(make_run: MakeRun) -> None:
    """Fails when the page says how to repeat a run of two ranks on one, or evaluates the old run again."""
    run = make_run("first")
    (run / "environment.json").write_text(json.dumps({"world_size": 2}))
    text = page_of(run)
    assert f"python -m launch.local --nproc 2 --config {run}/config.yaml --runs_dir repeated" in text
    assert "python -m sfw_dist.evaluate repeated/first --sparsities" in text


def test_table_shows_percent_with_one_decimal(make_run: MakeRun) -> None:
    """Fractions instead of percent, cells under the wrong sparsity, or a missing sparsity that shifts the row."""
    runs = [make_run("a"), make_run("b", accuracy={0.0: 0.99, 0.9: 0.3})]
    cells = Parsed(page_of(*runs)).cells
    assert cells[0][3:] == ["Dense", "50 %", "90 %", "95 %", "99 %"]
    assert ["command", "train.py --config 'a b.yaml'"] in cells
    assert cells[1] == [
        "a",
        "sfw",
        PRUNING,
        "98.0",
        "98.0",
        "97.1",
        "95.0",
        "40.0",
    ]
    assert cells[2] == ["b", "sfw", PRUNING, "99.0", "–", "30.0", "–", "–"]


def test_page_is_safe_to_open_and_to_mail(make_run: MakeRun, tmp_path: Path) -> None:
    """A name, configuration or environment from elsewhere becomes markup, or the page loads what is not in it."""
    evil = """<script src="//evil.example/x.js"></script><img src=x onerror='a()'> $\\frac & _x"""
    run = make_run(evil, folder="evil")
    (run / "environment.json").write_text(json.dumps({evil: evil}))
    text = write_report([run], tmp_path / "report").read_text(encoding="utf-8")
    assert text.count("&lt;script src=") >= 5  # title, table, configuration, environment's key and value

    parsed = Parsed(text)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert len(parsed.addresses) == len(FIGURES)
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    for loads in ("http:", "https:", "url(", "@import"):
        assert loads not in text
