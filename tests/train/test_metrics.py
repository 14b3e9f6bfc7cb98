"""Accuracy and loss: equal to the references whatever the batches and the precision of the logits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import log_loss, top_k_accuracy_score
from torch import Tensor

from sfw_dist.distributed.world import World
from sfw_dist.train.metrics import Metrics, Tally, measure

LONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
UNEVEN = [1, 300, 7, 64, 628]


def random_batch(samples: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits without ties, and labels that the larger logits favour."""
    logits = torch.stack([torch.randperm(classes) for _ in range(samples)]).float() + torch.rand(samples, 1)
    labels = torch.multinomial(torch.softmax(logits / 2, dim=1), 1).squeeze(1)
    return logits, labels


def tallied(logits: Tensor, labels: Tensor, sizes: Sequence[int]) -> Metrics:
    tally = Tally(LONE.device)
    for part, truth in zip(logits.split(list(sizes)), labels.split(list(sizes)), strict=True):
        tally.add(part, truth)
    return tally.total(LONE)


def test_metrics_equal_those_of_scikit_learn() -> None:
    """Fails when uneven batches weigh alike, or top-5 or the cross-entropy means something else than elsewhere."""
    logits, labels = random_batch(1000, classes=20)
    metrics = tallied(logits, labels, UNEVEN)
    classes = range(20)
    assert metrics.samples == 1000
    assert metrics.top1 == top_k_accuracy_score(labels, logits, k=1, labels=classes)
    assert metrics.top5 == top_k_accuracy_score(labels, logits, k=5, labels=classes)
    assert metrics.loss == pytest.approx(log_loss(labels, logits.double().softmax(1), labels=classes), rel=1e-6)
    assert metrics.top1 < metrics.top5 < 1


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_up_to_five_classes_are_all_among_the_top_five(classes: int) -> None:
    """Fails when ``topk`` is asked for more classes than there are."""
    logits, labels = random_batch(1000, classes)
    metrics = tallied(logits, labels, UNEVEN)
    assert metrics.top5 == 1.0
    assert metrics.top1 == (logits.argmax(1) == labels).double().mean().item()


def test_bf16_logits_are_summed_in_full_precision() -> None:
    """Fails when loss or counts are accumulated in bf16, which cannot tell 256 from 257."""
    logits, labels = random_batch(1000, classes=10)
    logits = logits.floor().bfloat16()  # whole numbers below 256 are exact in bf16
    metrics = tallied(logits, labels, UNEVEN)
    assert metrics.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-6)
    assert metrics.top1 == (logits.float().argmax(1) == labels).double().mean().item()


def test_how_samples_fall_into_batches_does_not_matter() -> None:
    """Fails when a mean of batch means is taken."""
    logits, labels = random_batch(1000, classes=10)
    whole, parts = tallied(logits, labels, [1000]), tallied(logits, labels, UNEVEN)
    assert (whole.top1, whole.top5, whole.samples) == (parts.top1, parts.top5, parts.samples)
    assert whole.loss == pytest.approx(parts.loss, rel=1e-6)


def test_measure_runs_the_model_once_over_every_batch() -> None:
    """Fails when a batch is left out or seen twice."""
    images = torch.randint(0, 256, (30, 1, 2, 5), dtype=torch.uint8)
    labels = torch.randint(0, 10, (30,))
    seen: list[Tensor] = []

    def forward(batch: Tensor) -> Tensor:
        seen.append(batch)
        return batch.flatten(1).float()

    loader = list(zip(images.split(8), labels.split(8), strict=True))
    measured = measure(forward, loader, LONE)
    assert torch.equal(torch.cat(seen), images)
    assert measured == tallied(images.flatten(1).float(), labels, [8, 8, 8, 6])


def test_passes_in_lockstep_count_the_same() -> None:
    """Fails when a pass that only keeps other ranks company counts, or one process makes such passes."""
    images = torch.randint(0, 256, (30, 1, 2, 5), dtype=torch.uint8)
    labels = torch.randint(0, 10, (30,))
    batches = list(zip(images.split(8), labels.split(8), strict=True))
    seen: list[int] = []

    def forward(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return batch.flatten(1).float()

    plain, lockstep = (measure(forward, batches, LONE, lockstep=value) for value in (False, True))
    assert plain == lockstep and seen == [8, 8, 8, 6] * 2
