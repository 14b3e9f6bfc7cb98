"""Who sees which sample when: hash, orders, shares, the validation split. Ranks are simulated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sfw_dist.data.sampler import EvaluationSampler, TrainingSampler, counter_hash, epoch_permutation, split_validation
from sfw_dist.errors import UserError


def test_hash_is_splitmix64() -> None:
    """A wrong constant weakens the generator unnoticed: these are splitmix64's first outputs for seeds 0 and 1."""
    assert counter_hash(0).tolist() == [0xE220A8397B1DCDAF]
    assert counter_hash(1).tolist() == [0x910A2DEC89025CC1]


def test_orders_never_change() -> None:
    """Another order (a new numpy, say) makes a resumed run see some samples twice and others never."""
    assert epoch_permutation(10, seed=0, epoch=0).tolist() == [0, 9, 1, 6, 3, 5, 4, 2, 8, 7]
    assert epoch_permutation(10, seed=2, epoch=7).tolist() == [7, 1, 5, 6, 4, 8, 3, 2, 0, 9]


def test_order_hashes_seed_and_epoch_apart() -> None:
    """seed + epoch as the seed: run 1 repeats run 0's batches, one epoch late."""
    orders = [tuple(epoch_permutation(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_order_is_uniform() -> None:
    """Some samples come early in every epoch."""
    positions = np.array([np.argsort(epoch_permutation(20, seed=0, epoch=epoch)) for epoch in range(2000)])
    np.testing.assert_allclose(positions.mean(axis=0), 9.5, atol=0.6)  # 4.6 standard deviations


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_sample_once_per_epoch(world_size: int) -> None:
    """Ranks overlap or skip: all but the last, partial global batch are visited exactly once."""
    members = np.arange(100, 162)
    shares = [TrainingSampler(members, 12, 0, rank, world_size) for rank in range(world_size)]
    ids = np.concatenate([share.ids(epoch=5) for share in shares])
    assert len(ids) == len(set(ids.tolist())) == 60 and set(ids.tolist()) <= set(members.tolist())
    assert all(len(share.ids(5)) == share.samples == 60 // world_size for share in shares)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_slice_the_batches_of_one_rank(world_size: int) -> None:
    """N ranks see other global batches than one rank: their gradients, and so the runs, differ."""
    one = TrainingSampler(np.arange(50), 12, 0, 0, 1).ids(3).reshape(4, 12)
    for rank in range(world_size):
        share = TrainingSampler(np.arange(50), 12, 0, rank, world_size)
        np.testing.assert_array_equal(share.ids(3).reshape(4, share.batch_size), one[:, rank::world_size])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_evaluation_shares_are_exact(world_size: int) -> None:
    """A padded sampler counts some samples twice: the accuracy depends on the world size."""
    shares = [EvaluationSampler(np.arange(13), 4, rank, world_size) for rank in range(world_size)]
    ids = np.concatenate([share.ids(0) for share in shares])
    assert sorted(ids.tolist()) == list(range(13))
    assert [share.samples for share in shares] == [len(share.ids(0)) for share in shares]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: TrainingSampler(np.arange(50), 10, 0, 0, 4), "data.batch_size 10.*world size 4.*write 8"),
        (lambda: TrainingSampler(np.arange(50), 3, 0, 0, 4), "data.batch_size 3.*world size 4.*write 4"),
        (
            lambda: TrainingSampler(np.arange(50), 64, 0, 0, 64),
            "batch_size 64.*world size 64.*50 training samples",
        ),
        (lambda: EvaluationSampler(np.arange(3), 4, 0, 4), "world size 4.*3 samples"),
    ],
)
def test_impossible_shares_are_refused(make: Callable[[], object], told: str) -> None:
    """Zero batches an epoch: training that does nothing, or ranks that wait for one another for ever."""
    with pytest.raises(UserError, match=told) as error:
        make()
    assert "\n" not in str(error.value)


def test_validation_split_is_stratified_and_disjoint() -> None:
    """Training on validation samples, or a class that is missing from validation."""
    labels = np.repeat(np.arange(4), [10, 20, 40, 30])
    train, validation = split_validation(labels, 0.2, seed=1)
    assert sorted(np.concatenate([train, validation]).tolist()) == list(range(100))
    assert np.bincount(labels[validation]).tolist() == [2, 4, 8, 6]
    assert not np.array_equal(validation, split_validation(labels, 0.2, seed=2)[1])
    assert len(split_validation(labels, 0.0, seed=1)[1]) == 0


def test_identities_decide_the_validation_split() -> None:
    """Fails when one image in front, or another order, moves all of the split."""
    labels, identities = np.arange(200) % 4, np.arange(1000, 1200, dtype=np.uint64)
    _, before = split_validation(labels, 0.2, 1, identities)
    order = np.random.default_rng(0).permutation(200)
    _, after = split_validation(labels[order], 0.2, 1, identities[order])
    assert set(identities[before]) == set(identities[order][after])
    more_labels, more = np.append(2, labels), np.append(np.uint64(7), identities)
    _, after = split_validation(more_labels, 0.2, 1, more)
    moved = set(identities[before]) ^ set(more[after])
    assert len(moved) <= 2 and all(more_labels[np.flatnonzero(more == one)] == 2 for one in moved)


@pytest.mark.parametrize(
    ("sizes", "fraction", "held_out"),
    [
        ([4] * 30, 0.1, [1] * 30),
        ([1, 2, 4, 5, 14, 15, 100], 0.1, [0, 1, 1, 1, 1, 2, 10]),
        ([1, 2, 4, 100], 0.9, [0, 1, 3, 90]),
        ([1, 2, 100], 0.999, [0, 1, 99]),
        ([1, 2, 100], 0.0, [0, 0, 0]),
    ],
)
def test_small_classes_have_validation_and_training_samples(
    sizes: list[int], fraction: float, held_out: list[int]
) -> None:
    """Fails when 30 classes of 4 images leave no validation split, or a class keeps nothing to train on."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    _, validation = split_validation(labels, fraction, seed=1)
    assert np.bincount(labels[validation], minlength=len(sizes)).tolist() == held_out
