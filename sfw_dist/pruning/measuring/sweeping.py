"""The curve of any trained model: pruned to many sparsities, and each measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sfw_dist.distributed.rank_group import RankGroup, disagreement
from sfw_dist.errors import UserError
from sfw_dist.pruning.granularity import GranularityName, Ranking
from sfw_dist.pruning.measuring.batches import check_loader, device_of, labelled_batch
from sfw_dist.pruning.measuring.curve import Curve, CurvePoint
from sfw_dist.pruning.measuring.one_pass import measure_prunings
from sfw_dist.pruning.measuring.progress import Progress, reported
from sfw_dist.pruning.measuring.tallies import ClassificationTally, Means, Metric, MetricTally, Tally, means_over_ranks
from sfw_dist.pruning.one_shot import Pruner
from sfw_dist.pruning.options import PruningOptions
from sfw_dist.pruning.recalibration import AS_TRAINED, Statistics, batch_norms, recalibrated_statistics
from sfw_dist.pruning.result import Pruning
from sfw_dist.pruning.scope import Scope, check_initialised
from sfw_dist.pruning.sparsities import PAPER_SPARSITIES


def sweep(
    model: nn.Module,
    loader: Iterable[Any],
    sparsities: Sequence[float] | None = None,
    *,
    scope: Scope = "weights",
    granularity: GranularityName = "weight",
    ranking: Ranking = "global",
    criterion: str = "magnitude",
    scores: Mapping[str, Tensor] | None = None,
    calibration: Iterable[Any] | None = None,
    calibration_batches: int | None = 50,
    metric: Metric | None = None,
    device: torch.device | str | int | None = None,
    process_group: dist.ProcessGroup | None = None,
    progress: bool | Progress | None = None,
) -> Curve:
    """Prune a trained model to each sparsity and measure it, in one pass over ``loader``.

    With several processes every rank calls this, with the same arguments and its own part of the data: means are over
    the samples of all ranks, and every rank gets the same curve. Ranks that all give the whole data get the same means,
    and ``samples`` counts each rank's. A replicated model (DistributedDataParallel) may have another number of batches
    on each rank, even none. Of a divided one (FSDP2, tensor parallelism) each rank needs at least one batch; where one
    has fewer than others, it runs its last batch again and does not count it.

    Args:
        model: trained, in any mode; compiled, or wrapped in ``DataParallel`` or ``DistributedDataParallel``; its
            parameters may be DTensors. Afterwards weights, BatchNorm's statistics and modes are to the bit what they
            were, also after an error or Ctrl-C. Meanwhile there is a copy of its prunable parameters, and for each
            sparsity a mask of a byte an entry.
        loader: batches, once; an iterator will do. Tuples or lists that begin with inputs and targets, or dictionaries
            with ``labels`` (or ``label``), of which ``model.forward`` gets what it has a name for. Batches without
            samples are left out.
        sparsities: fractions to remove; ``None``: 0 and the paper's 18, or the only one that the granularity takes.
        scope: as the next four for :func:`prune`.
        granularity: what is removed as one piece.
        ranking: what the pieces are ranked against.
        criterion: what scores an entry.
        scores: your own scores instead.
        calibration: batches as for :func:`recalibrate`, of training data; an iterator will do. The model is then
            measured a second time for each sparsity, with BatchNorm's statistics measured again: the mean over the
            batches of all ranks. A model without BatchNorm needs none, and does not read them.
        calibration_batches: how many of them each rank takes at most; ``None``: all.
        metric: from what the model returns, in evaluation mode, and a copy of a batch's targets to one number, or to
            several in a dictionary. Each is averaged over the batches, weighted by their samples. Of a dictionary
            without labels the targets are the whole of it. ``None``: ``top1``, ``top5`` (both fractions) and ``loss``
            (cross-entropy) of a classifier.
        device: to which tensors are moved. ``None``: where the model's first parameter is.
        process_group: the ranks that share the work; ``None``: all, if torch's default group is initialised. A rank
            that calls this alone gives ``dist.new_group([rank], use_local_synchronization=True)``.
        progress: ``None``: a line on stderr if that is a terminal; ``True`` and ``False``: always, never. Or a function
            that is called after each batch with what was done (``"recalibrated"``, ``"measured"``), the number of
            batches and the number of all, or ``None`` if that is not known. Rank 0 alone reports.

    Returns:
        A point for each sparsity: exact counts and means.

    Raises:
        UserError: as :func:`prune`; no batch, or one without inputs; without ``metric``, outputs and targets that are
            no logits and labels of a classifier; a metric that gives no real numbers; lazy layers;
            ranks with other arguments or models.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        >>> loader = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(2)]
        >>> curve = sweep(net, loader, [0, 0.5], calibration=loader)
        >>> [(point.sparsity, point.prunable_kept, point.samples) for point in curve]
        [(0.0, 56, 32), (0.5, 28, 32)]
        >>> list(curve[1].recalibrated)
        ['top1', 'top5', 'loss']
        >>> mse = sweep(nn.Linear(4, 4), [torch.randn(16, 4)] * 2, [0.5], metric=lambda y, _: {"size": y.norm()})
        >>> list(mse[0].metrics)
        ['size']
    """
    options = PruningOptions(scope, granularity, ranking, criterion)
    sparsities = _checked_sparsities(sparsities, options)
    if calibration_batches is not None and calibration_batches < 1:
        raise UserError(f"calibration_batches must be at least 1, got {calibration_batches}: leave calibration out")
    if metric is not None and not callable(metric):
        raise UserError(f"metric is {metric!r}: give a function of (outputs, targets), or None for top1 and loss")
    check_loader(loader, "loader")
    if calibration is not None:
        check_loader(calibration, "calibration")
    check_initialised(model)
    ranks = RankGroup.of(process_group)
    place = device_of(model) if device is None else torch.device(device)
    recalibrates = calibration is not None and bool(batch_norms(model))
    _verify_same(model, [sparsities, options, recalibrates, calibration_batches, metric is None], ranks, place)
    progress = progress if ranks.rank == 0 else False

    pruner = Pruner(model, options, scores=scores)
    prunings = [pruner.at(sparsity) for sparsity in sparsities]
    del pruner  # and the scores
    variants = [[AS_TRAINED] for _ in prunings]
    if calibration is not None and recalibrates:
        training = reported(calibration, "recalibrated", progress, most=calibration_batches)
        found = recalibrated_statistics(model, prunings, training, ranks, device=place)
        variants = [[AS_TRAINED, statistics] for statistics in found]
    tallies = _tallies(variants, place, metric)
    batches = (labelled_batch(model, batch, place) for batch in reported(loader, "measured", progress))
    some = (batch for batch in batches if batch.size)  # without samples a metric's mean is NaN
    measure_prunings(model, prunings, variants, some, tallies, ranks, place)
    means = iter(means_over_ranks([tally for sums in tallies for tally in sums], ranks))
    total = sum(parameter.numel() for parameter in model.parameters())
    return Curve(
        [
            _point(sparsity, pruning, total, [next(means) for _ in sums])
            for sparsity, pruning, sums in zip(sparsities, prunings, tallies, strict=True)
        ]
    )


def _checked_sparsities(sparsities: Sequence[float] | None, options: PruningOptions) -> list[float]:
    if sparsities is None:
        return options.default_sparsities((0.0, *PAPER_SPARSITIES))
    if isinstance(sparsities, str) or not isinstance(sparsities, Iterable):
        raise UserError(f"sparsities are {sparsities!r}: give a list of numbers, as [0, 0.5, 0.9]")
    given = list(sparsities)
    if not given:
        raise UserError("sparsities are empty: give at least one, as [0.9]")
    for sparsity in given:
        options.check_sparsity(sparsity)
    return [float(str(sparsity)) for sparsity in given]  # of numpy's float32 the number that was written


def _verify_same(model: nn.Module, arguments: Sequence[object], ranks: RankGroup, device: torch.device) -> None:
    """Raise :class:`UserError` on every rank if they would measure different things."""
    tensors = [f"{name} {tuple(parameter.shape)}" for name, parameter in model.named_parameters()]
    differing = disagreement([*map(repr, arguments), *tensors], ranks, {device})
    if differing:
        raise UserError(
            f"ranks {differing} call sweep with other sparsities, options or another model than rank 0: give the same "
            "ones on every rank"
        )


def _tallies(
    variants: Sequence[Sequence[Statistics]], device: torch.device, metric: Metric | None
) -> list[list[Tally]]:
    """One for each pruning and each of its statistics."""
    if metric is not None:
        return [[MetricTally(device, metric) for _ in some] for some in variants]
    # Labels are the same for all prunings: the first one checks them.
    return [
        [ClassificationTally(device, checked=i == j == 0) for j in range(len(some))] for i, some in enumerate(variants)
    ]


def _point(sparsity: float, pruning: Pruning, parameters: int, means: Sequence[Means]) -> CurvePoint:
    return CurvePoint(
        sparsity=sparsity,
        prunable_total=pruning.total,
        prunable_kept=pruning.kept,
        parameters_total=parameters,
        parameters_kept=parameters - (pruning.total - pruning.kept),
        samples=means[0].samples,
        metrics=means[0].values,
        recalibrated=means[1].values if len(means) > 1 else None,
    )
