"""Domains of a run's fields, and which fields may change when a run is resumed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sfw_dist.config import Config, ConstraintConfig, DeepSpeedConfig, FSDPConfig, OptimizerConfig, first_difference
from tests.support.config_files import Write, error_of


@pytest.mark.parametrize(
    ("text", "key", "value", "remedy"),
    [
        ("prune: {granularity: filters}", "prune.granularity", "filters", "'filter'"),
        ("prune: {granularity: rank, ranking: layerwise}", "granularity rank", "layerwise", "write ranking global"),
        ("prune: {criterion: best}", "criterion", "best", "choose one of magnitude"),
        ("prune: {recalibrate: -1}", "recalibrate", "-1", "write 50"),
        ("optimizer: {lr: 0}", "optimizer.lr", "0.0", "write 1.0"),
        ("optimizer: {lr: .nan}", "optimizer.lr", "nan", "write 1.0"),
        ("optimizer: {momentum: 1}", "optimizer.momentum", "1.0", "write 0.9"),
        ("optimizer: {weight_decay: -1}", "optimizer.weight_decay", "-1.0", "write 0.0005"),
        ("optimizer: {unconstrained_lr: 0}", "optimizer.unconstrained_lr", "0.0", "write 0.05"),
        ("optimizer: {name: adam}", "optimizer.name", "adam", "'sfw', 'sgd'"),
        ("data: {batch_size: 0}", "data.batch_size", "0", "write 128"),
        ("data: {eval_batch_size: 0}", "data.eval_batch_size", "0", "write 256"),
        ("data: {validation_fraction: 1}", "data.validation_fraction", "1.0", "write 0.1"),
        ("data: {workers: -1}", "data.workers", "-1", "write 0"),
        ("data: {crop_padding: -1}", "data.crop_padding", "-1", "write 4"),
        ("model: {width: 0}", "model.width", "0.0", "write 1.0"),
        ("schedule: {milestones: [0.5, 2]}", "schedule.milestones", "2.0", "write [0.333, 0.667]"),
        ("schedule: {gamma: 0}", "schedule.gamma", "0.0", "write 0.1"),
        ("train: {epochs: 0}", "train.epochs", "0", "write 180"),
        ("train: {log_every: 0}", "train.log_every", "0", "write 20"),
        ("train: {keep_checkpoints: 0}", "train.keep_checkpoints", "0", "write 2"),
        ("train: {accumulate: 0}", "train.accumulate", "0", "write 1"),
        ("engine: fsdp2", "engine", "fsdp2", "'fsdp'"),
        ("fsdp: {replicas: 0}", "fsdp.replicas", "0", "write 1"),
        ("deepspeed: {stage: 4}", "deepspeed.stage", "4", "[0, 1, 2, 3]"),
        ("deepspeed: {stage: 3}", "deepspeed.stage", "3", "engine: fsdp"),
        ("engine: fsdp\noptimizer: {grads: reduce_to_owner}", "grads", "reduce_to_owner", "engine: ddp"),
        ("engine: fsdp\ntrain: {channels_last: true}", "train.channels_last", "True", "engine: ddp"),
        ("engine: deepspeed\ntrain: {compile: true}", "train.compile", "True", "engine: ddp"),
        ("prune: {sparsities: [1.5]}", "prune.sparsities", "1.5", "write 0.9"),
        ("name: a/b", "name", "'a/b'", "write letters"),
        ("name: ..", "name", "'..'", "write letters"),
        ("seed: -1", "seed", "-1", "write 0"),
    ],
)
def test_a_bad_value_is_refused_in_one_line(write: Write, text: str, key: str, value: str, remedy: str) -> None:
    """Fails when a mistake in a file is passed over, crashes later, or its message lacks key, value or remedy."""
    message = error_of("--config", write(text))
    for part in (key, value, remedy):
        assert part in message


def test_first_difference_names_the_key_and_both_values() -> None:
    """Fails when a refused resume does not say what differs."""
    mine = Config(name="a", optimizer=OptimizerConfig(lr=0.5, constraint=ConstraintConfig(k_frac=0.1)))
    assert first_difference(mine, Config(name="a")) == "optimizer.lr is 0.5, was 1.0"
    same_rate = replace(mine, optimizer=replace(mine.optimizer, lr=1.0))
    assert first_difference(same_rate, Config(name="a")) == "optimizer.constraint.k_frac is 0.1, was 0.05"
    assert first_difference(mine, replace(mine)) is None


def test_a_run_may_go_on_by_another_engine_but_not_in_other_pieces() -> None:
    """Fails when a network that outgrew its GPU cannot resume, or BatchNorm's statistics change on the way."""
    mine = Config(name="a", engine="fsdp", fsdp=FSDPConfig(replicas=2), deepspeed=DeepSpeedConfig(stage=2))
    assert first_difference(mine, Config(name="a")) is None
    pieces = replace(mine, train=replace(mine.train, accumulate=4))
    assert first_difference(pieces, Config(name="a")) == "train.accumulate is 4, was 1"
