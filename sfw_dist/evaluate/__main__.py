"""Prune a trained network to many sparsities and measure each on the test set, in one pass over it.

python -m sfw_dist.evaluate runs/digits_sfw
python -m sfw_dist.evaluate runs/digits_sfw --max-drop 1.0
python -m sfw_dist.evaluate runs/digits_sfw --sparsities 0.5,0.9:0.99:0.01 --kind layerwise
torchrun --nproc-per-node 2 -m sfw_dist.evaluate runs/digits_sfw --sparsities 0.9 --export
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from sfw_dist.errors import UserError, command_imports, reports_user_errors

with command_imports("sfw_dist.evaluate", "train"):
    from rich.console import Console
    from rich.table import Table

    from sfw_dist.distributed.world import joined_world
    from sfw_dist.evaluate.sparsity_search import evaluate_max_drop
    from sfw_dist.evaluate.sweep import evaluate
    from sfw_dist.pruning.one_shot import Kind
    from sfw_dist.pruning.scope import Scope
    from sfw_dist.pruning.sparsities import parse_sparsities
    from sfw_dist.train.run_folder import RunFolder

_EXAMPLES = "\n".join((__doc__ or "").split("\n\n")[1].splitlines())


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sfw_dist.evaluate",
        description="Prune a trained network to many sparsities and measure each on the test set.",
        epilog=f"examples:\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--sparsities", metavar="LIST", help="fractions removed, as in 0.5,0.9:0.99:0.01 (default: the run's)"
    )
    parser.add_argument("--scope", choices=get_args(Scope), help="what is pruned (default: the run's)")
    parser.add_argument("--kind", choices=get_args(Kind), help="what goes (default: the run's)")
    parser.add_argument(
        "--recalibrate",
        type=int,
        metavar="N",
        help="batches of training images from which BatchNorm's statistics are measured anew after pruning, beside "
        "the accuracy without; 0: only without (default: the run's)",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="find the highest sparsity, to 0.1 points, whose validation accuracy is at most this many points below "
        "the dense network's, as in 1.0; then measure that one on the test set, once",
    )
    parser.add_argument("--data-root", metavar="DIR", help="folder of the prepared data sets (default: the run's)")
    parser.add_argument(
        "--export",
        action="store_true",
        help="write the pruned networks as safetensors, too, with recalibrated statistics unless --recalibrate is 0",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args(argv)

    if arguments.max_drop is not None and arguments.sparsities is not None:
        raise UserError(f"--max-drop {arguments.max_drop:g} looks for the sparsity itself: leave --sparsities out")
    sparsities = None if arguments.sparsities is None else parse_sparsities(arguments.sparsities)
    run = RunFolder.existing(arguments.run)
    options = {key: getattr(arguments, key) for key in ("scope", "kind", "recalibrate", "data_root", "export")}
    with joined_world() as world:
        if arguments.max_drop is not None:
            found = evaluate_max_drop(run, world, arguments.max_drop, **options)
            results, show = [found], _print_search
        else:
            results, show = evaluate(run, world, sparsities=sparsities, **options), _print_table
        if not world.main:
            return 0
        if results and not results[0]["bn_layers"] and arguments.recalibrate != 0:
            print("note: the network has no BatchNorm, so nothing was recalibrated", file=sys.stderr)
        if arguments.json:
            print(json.dumps(results if arguments.max_drop is None else results[0]))
        else:
            show(results)
    return 0


def _print_table(results: list[dict[str, Any]]) -> None:
    recalibrated = any(result["bn_recalibrated"] for result in results)
    extra = ["recal. top-1 %"] if recalibrated else []
    table = Table("sparsity", "top-1 %", *extra, "top-5 %", "loss", "parameters kept", "speed-up in theory")
    for result in results:
        anew = [_percent(result["top1_recalibrated"])] if recalibrated else []
        top5, loss = _percent(result["top5"]), _loss(result["loss"])
        kept = f"{result['parameters_kept']:,}"
        table.add_row(f"{result['sparsity']:.4g}", _percent(result["top1"]), *anew, top5, loss, kept, _speed_up(result))
    Console().print(table)


def _print_search(results: list[dict[str, Any]]) -> None:
    """The points that were tried, what was found, and what a reader might not expect of it."""
    (result,) = results
    table = Table("sparsity", "validation top-1 %", "points lost", "loss", f"within {result['max_drop']:g}")
    for row in result["searched"]:
        top1, loss, within = _percent(row["top1"]), _loss(row["loss"]), "yes" if row["within"] else "no"
        table.add_row(f"{row['sparsity']:.3f}", top1, f"{row['drop']:.2f}", loss, within)
    Console().print(table)
    test = result["test"]
    how = "BatchNorm recalibrated" if result["bn_recalibrated"] else "BatchNorm as trained"
    print(
        f"sparsity {result['sparsity']:.3f} ({result['parameters_kept']:,} parameters kept, theoretical speed-up "
        f"{_speed_up(result)}): test top-1 {_percent(test['top1'])} % on {test['samples']:,} images, {how}"
    )
    below = [
        f"{row['sparsity']:g}"
        for row in result["searched"]
        if row["sparsity"] < result["sparsity"] and not row["within"]
    ]
    if below:
        print(f"note: accuracy does not fall steadily: {', '.join(below)} lost more than {result['max_drop']:g} points")
    if result["sparsity"] == result["searched"][-1]["sparsity"]:
        print("note: the search goes no higher")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _speed_up(result: dict[str, Any]) -> str:
    return f"{result['flops_dense'] / result['flops']:.2f}x" if result["flops"] else "-"


if __name__ == "__main__":
    sys.exit(main())
