"""Prune a trained network to many sparsities and measure each on the test set, in one pass over it.

python -m sfw_dist.evaluate runs/digits_cnn
python -m sfw_dist.evaluate runs/digits_cnn --sparsities 0.5,0.9:0.99:0.01 --kind layerwise
torchrun --nproc-per-node 2 -m sfw_dist.evaluate runs/digits_cnn --sparsities 0.9 --export
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

from sfw_dist.config import Config, load_config
from sfw_dist.data import Loader, Normalize, dataset_info, open_loader
from sfw_dist.distributed import World, barrier, joined_world
from sfw_dist.engine import autocast
from sfw_dist.errors import UserError, reports_user_errors
from sfw_dist.files import write_json
from sfw_dist.metrics import Metrics, Tally
from sfw_dist.models import build_model
from sfw_dist.prune import (
    Kind,
    Masks,
    Scope,
    count_flops,
    dead_layers,
    kept_flops,
    layer_table,
    magnitude_masks,
    parse_sparsities,
)
from sfw_dist.run import RunFolder, write_tensors

_EXAMPLES = "\n".join((__doc__ or "").split("\n\n")[1].splitlines())


def measure_pruned(
    model: nn.Module, masks: Sequence[Masks], loader: Loader, normalize: Normalize, config: Config, world: World
) -> list[Metrics]:
    """Metrics of ``model`` under each of ``masks``, in one pass over ``loader``; collective.

    Only the masks (a byte an entry) are kept for each sparsity; masked weights are made anew for every batch.
    """
    model.eval()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tallies = [Tally(world.device) for _ in masks]
    for images, labels in loader:
        images, labels = images.to(world.device, non_blocking=True), labels.to(world.device, non_blocking=True)
        inputs = normalize(images)
        for tally, mask in zip(tallies, masks, strict=True):
            pruned = {name: torch.where(kept, weights[name], 0) for name, kept in mask.items()}
            with torch.no_grad(), autocast(config, world.device):
                tally.add(functional_call(model, pruned, (inputs,)), labels)
    return [tally.total(world) for tally in tallies]


def evaluate(
    run: RunFolder,
    world: World,
    *,
    sparsities: Sequence[float] | None = None,
    scope: Scope | None = None,
    kind: Kind | None = None,
    data_root: str | None = None,
    export: bool = False,
) -> list[dict[str, Any]]:
    """Prune and measure a finished run; writes ``prune/s<sparsity>.json`` and returns what it wrote. Collective.

    Args:
        run: with ``model.safetensors``.
        sparsities, scope, kind: ``None`` takes the run's configuration (``prune:``).
        data_root: where the data set lies now, if elsewhere than in training.
        export: write the pruned weights too, as ``prune/s<sparsity>.safetensors``.

    Raises:
        UserError: no such run, not yet trained, another model's weights, or a data set that is not there.
    """
    config = load_config(run.config)
    if data_root is not None:
        config = replace(config, data=replace(config.data, root=data_root))
    scope, kind = scope or config.prune.scope, kind or config.prune.kind
    if sparsities is None:
        sparsities = [0.5] if kind == "2:4" else config.prune.sparsities
    files = {sparsity: run.prune / f"s{sparsity:.4f}.json" for sparsity in sparsities}
    _check_files(files, scope, kind)
    info = dataset_info(config.data)
    loader = open_loader(
        config.data, "test", seed=config.seed, rank=world.rank, world_size=world.size, device=world.device
    )
    model = _trained_model(run, config, len(info.classes), info.image_shape[0]).to(world.device)
    normalize = Normalize(info.mean, info.std).to(world.device)

    masks = [magnitude_masks(model, sparsity, scope=scope, kind=kind) for sparsity in sparsities]
    measured = measure_pruned(model, masks, loader, normalize, config, world)
    loader.close()
    flops = count_flops(model, torch.zeros(1, *info.image_shape, device=world.device))
    total = sum(parameter.numel() for parameter in model.parameters())

    results = []
    for sparsity, mask, metrics in zip(sparsities, masks, measured, strict=True):
        removed = mask.total - mask.kept
        result = {
            "sparsity": sparsity,
            "scope": scope,
            "kind": kind,
            "achieved_sparsity_all": removed / total,
            "achieved_sparsity_prunable": mask.sparsity,
            **{key: _finite(value) for key, value in asdict(metrics).items()},
            "split": "test",
            "flops_dense": sum(flops.values()),
            "flops": kept_flops(flops, mask),
            "parameters_total": total,
            "parameters_kept": total - removed,
            "layers": layer_table(model, mask),
            "dead_layers": dead_layers(mask),
            "bn_recalibrated": False,
            "seed": config.seed,
        }
        results.append(result)
        if world.main:
            write_json(files[sparsity], result)
            if export:
                _export(model, mask, files[sparsity].with_suffix(".safetensors"))
    barrier(world)
    return results


def _check_files(files: dict[float, Path], scope: Scope, kind: Kind) -> None:
    """Raise :class:`UserError` rather than write one result over another that is not of the same pruning."""
    if len(set(files.values())) < len(files):
        raise UserError(f"sparsities {', '.join(map(str, files))} agree in four decimals: leave some out")
    for path in files.values():
        if path.is_file():
            there = json.loads(path.read_text())
            if (there["scope"], there["kind"]) != (scope, kind):
                raise UserError(
                    f"{path} holds the result of --scope {there['scope']} --kind {there['kind']}: move "
                    f"{path.parent} away to measure --scope {scope} --kind {kind}"
                )


def _trained_model(run: RunFolder, config: Config, classes: int, channels: int) -> nn.Module:
    model = build_model(config.model.name, num_classes=classes, in_channels=channels, width=config.model.width)
    try:
        model.load_state_dict(run.load_weights())
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{run.weights} is not of the run's model ({reason}): train the run again") from None
    return model


def _export(model: nn.Module, masks: Masks, path: Path) -> None:
    """The pruned network's parameters and buffers by name."""
    state: dict[str, Tensor] = {
        name: torch.where(masks[name], tensor, 0) if name in masks else tensor
        for name, tensor in model.state_dict().items()
    }
    write_tensors(path, state)


def _finite(value: float) -> float | None:
    """``None`` in place of what JSON cannot say: a network pruned too far may have an infinite loss."""
    return value if abs(value) < float("inf") else None


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
    parser.add_argument("--kind", choices=get_args(Kind), help="where magnitudes compete (default: the run's)")
    parser.add_argument("--data-root", metavar="DIR", help="folder of the prepared data sets (default: the run's)")
    parser.add_argument("--export", action="store_true", help="write the pruned weights as safetensors, too")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args(argv)

    sparsities = None if arguments.sparsities is None else parse_sparsities(arguments.sparsities)
    run = RunFolder.existing(arguments.run)
    with joined_world() as world:
        results = evaluate(
            run,
            world,
            sparsities=sparsities,
            scope=arguments.scope,
            kind=arguments.kind,
            data_root=arguments.data_root,
            export=arguments.export,
        )
        if world.main:
            print(json.dumps(results)) if arguments.json else _print_table(results)
    return 0


def _print_table(results: list[dict[str, Any]]) -> None:
    table = Table("sparsity", "top-1 %", "top-5 %", "loss", "parameters kept", "theoretical speed-up")
    for result in results:
        loss = "-" if result["loss"] is None else f"{result['loss']:.4f}"
        top1, top5 = f"{100 * result['top1']:.2f}", f"{100 * result['top5']:.2f}"
        speed_up = f"{result['flops_dense'] / result['flops']:.2f}x" if result["flops"] else "-"
        table.add_row(f"{result['sparsity']:.4g}", top1, top5, loss, f"{result['parameters_kept']:,}", speed_up)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
