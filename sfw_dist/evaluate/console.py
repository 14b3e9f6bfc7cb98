"""Tables on the terminal of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sfw_dist.errors import named


def print_sweep(results: Sequence[Mapping[str, Any]]) -> None:
    """Print one line for each sparsity."""
    recalibrated = any(result["bn_recalibrated"] for result in results)
    extra = ["top-1 %, recalibrated"] if recalibrated else []
    table = Table("sparsity", "top-1 %", "top-5 %", "loss", *extra, "parameters kept", "speed-up in theory")
    for result in results:
        again = [_percent(result["top1_recalibrated"])] if recalibrated else []
        top5, loss = _percent(result["top5"]), _loss(result["loss"])
        kept = f"{result['parameters_kept']:,}"
        table.add_row(
            f"{result['sparsity']:.4g}", _percent(result["top1"]), top5, loss, *again, kept, _speed_up(result)
        )
    _console().print(table)
    for result in results:
        if result["dead_layers"]:
            print(f"note: at {result['sparsity']:.4g} nothing is left of {named(result['dead_layers'])}")


def print_search(result: Mapping[str, Any]) -> None:
    """Print the sparsities that were tried, the one that was found, and what a reader might not expect of it."""
    table = Table("sparsity", "validation top-1 %", "points lost", "loss", f"within {result['max_drop']:g}")
    for row in result["searched"]:
        top1, loss, within = _percent(row["top1"]), _loss(row["loss"]), "yes" if row["within"] else "no"
        table.add_row(f"{row['sparsity']:.3f}", top1, f"{row['drop']:.2f}", loss, within)
    _console().print(table)
    test = result["test"]
    how = "BatchNorm recalibrated" if result["bn_recalibrated"] else "BatchNorm as trained"
    print(
        f"sparsity {result['sparsity']:.3f} ({result['parameters_kept']:,} parameters kept, theoretical speed-up "
        f"{_speed_up(result)}): test top-1 {_percent(test['top1'])} % on {test['samples']:,} images, dense "
        f"{_percent(result['test_dense']['top1'])} %, {how}"
    )
    images = result["validation"]["samples"]
    print(f"note: it was chosen on {images:,} validation images, each of them {100 / images:.2f} points")
    below = [
        f"{row['sparsity']:g}"
        for row in result["searched"]
        if row["sparsity"] < result["sparsity"] and not row["within"]
    ]
    if below:
        print(f"note: accuracy does not fall steadily: {', '.join(below)} lost more than {result['max_drop']:g} points")
    if result["sparsity"] == result["searched"][-1]["sparsity"]:
        print("note: the search goes no higher")


def _console() -> Console:
    """The terminal; in a file or a pipe, lines wide enough for the headers."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _speed_up(result: Mapping[str, Any]) -> str:
    return f"{result['flops_dense'] / result['flops']:.2f}x" if result["flops"] else "-"
