"""Made-up run folders for the tests of the report, and what they look at."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from sfw_dist.report import page, table
from sfw_dist.report.runs import read_runs

FIGURES = {"curve.png", "weights.png", "training.png", "layers.png"}
ACCURACY = {0.0: 0.98, 0.5: 0.98, 0.9: 0.971, 0.95: 0.95, 0.99: 0.4}
LAYERS = {"conv1.weight": 576, "conv2.weight": 73_728, "fc.weight": 1_280}
BIASES = 416

MakeRun = Callable[..., Path]


def pruning_result(sparsity: float, top1: float) -> dict[str, Any]:
    """A ``prune/s*.json`` in which every layer has the same sparsity and a multiplication costs one weight."""
    prunable = sum(LAYERS.values())
    removed = {name: round(sparsity * size) for name, size in LAYERS.items()}
    kept = prunable - sum(removed.values())
    return {
        "sparsity": sparsity,
        "scope": "weights",
        "kind": "global",
        "achieved_sparsity_all": 1 - (kept + BIASES) / (prunable + BIASES),
        "achieved_sparsity_prunable": 1 - kept / prunable,
        "top1": top1,
        "top5": None,
        "loss": 0.1,
        "samples": 450,
        "split": "test",
        "flops_dense": 2 * prunable,
        "flops": 2 * kept,
        "parameters_total": prunable + BIASES,
        "parameters_kept": kept + BIASES,
        "layers": [
            {
                "name": name,
                "shape": [size],
                "parameters": size,
                "kept": size - removed[name],
                "sparsity": removed[name] / size,
            }
            for name, size in LAYERS.items()
        ],
        "dead_layers": [],
        "bn_recalibrated": False,
        "seed": 0,
    }


def epoch(number: int, top1: float) -> list[dict[str, Any]]:
    """The records of one epoch of ten steps."""
    step = 10 * number
    return [
        {"event": "train", "step": step, "epoch": number, "loss": 1 / number, "lr": 1.0, "gap": 5.0 / number},
        {
            "event": "epoch",
            "epoch": number,
            "step": step,
            "train_loss": 1 / number,
            "validation_loss": 1.0,
            "validation_top1": top1,
            "validation_top5": 1.0,
            "lr": 1.0,
            "seconds": 1.5,
        },
    ]


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def recalibrate(run: Path, gain: float = 0.01, batches: int = 9, **more: Any) -> None:
    """Give a run's results an accuracy after recalibration."""
    for path in (run / "prune").iterdir():
        result = json.loads(path.read_text())
        again = {"top1_recalibrated": result["top1"] + gain, "top5_recalibrated": None, "loss_recalibrated": 0.05}
        told = {"bn_recalibrated": True, "bn_layers": 3, "recalibration_batches": batches}
        path.write_text(json.dumps({**result, **again, **told, **more}))


def rows_of(*runs: Path) -> list[dict[str, str]]:
    """The rows of curve.csv."""
    return list(csv.DictReader(io.StringIO(table.curve_csv(read_runs(runs)))))


def page_of(*runs: Path) -> str:
    """The page, without its figures."""
    return page.render(read_runs(runs), {})


class Parsed(HTMLParser):
    """Text, tags and addresses of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th") and self.cells:
            self.cells[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.cells and self.cells[-1] and self.lasttag in ("td", "th", "span", "strong", "br"):
            self.cells[-1][-1] += data.strip()
