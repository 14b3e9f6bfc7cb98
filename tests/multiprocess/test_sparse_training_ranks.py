"""Baselines, K over the epochs and the sparse-training methods on real ranks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from sfw_dist.config import Config, CramConfig, GMPConfig, KScheduleConfig, OptimizerConfig
from sfw_dist.distributed.world import World, barrier
from sfw_dist.train import checkpoint
from sfw_dist.train.k_schedule import KSchedule
from sfw_dist.train.sparse_training import build_training_method
from sfw_dist.train.strategies import build_strategy
from sfw_dist.train.trainer import train
from tests.support.ranks import run_on_ranks
from tests.support.training import ONE_PROCESS, baselines, small_config

RANKS = 3
SGD = OptimizerConfig(name="sgd", lr=0.1)
CONFIGS = {
    "gmp": Config(name="x", optimizer=SGD, method="gmp", gmp=GMPConfig(begin=0, end=0.5, every=1)),
    "cram": Config(name="x", optimizer=SGD, method="cram", cram=CramConfig(rho=0.2)),
    "sampled": Config(name="x", optimizer=OptimizerConfig(lr=0.3), method="sampled"),
    "k_schedule": Config(name="x", optimizer=OptimizerConfig(lr=0.3, k_schedule=KScheduleConfig(kind="linear", end=1))),
}
EPOCHS, STEPS = 4, 3


def world() -> World:
    if not dist.is_initialized():
        return ONE_PROCESS
    return World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))


def trained(config: Config) -> dict[str, Tensor]:
    """The weights of a network without BatchNorm, whose statistics would depend on the number of ranks."""
    here = world()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 40), nn.Tanh(), nn.Linear(40, 5))
    engine = build_strategy(network, config, here)
    engine.warm_up((1, 6, 6))
    method = build_training_method(engine, config, EPOCHS * STEPS)
    k_schedule = KSchedule(engine.optimizer, config.optimizer, EPOCHS)
    for epoch in range(EPOCHS):
        k_schedule.begin_epoch(epoch)
        for step in range(epoch * STEPS, (epoch + 1) * STEPS):
            generator = torch.Generator().manual_seed(step)
            images, labels = torch.randn(24, 1, 6, 6, generator=generator), torch.randint(5, (24,), generator=generator)
            method.train_step(images.chunk(here.size)[here.rank], labels.chunk(here.size)[here.rank], step)
            engine.verify_replicas()
    return {name: tensor.clone() for name, tensor in engine.weights().items()}


def all_trained(rank: int) -> dict[str, dict[str, Tensor]]:
    k_schedule = CONFIGS["k_schedule"]
    to_owner = replace(k_schedule.optimizer, grads="reduce_to_owner")
    more = {
        "k_schedule_fsdp": replace(k_schedule, engine="fsdp"),
        "k_schedule_to_owner": replace(k_schedule, optimizer=to_owner),
    }
    return {what: trained(config) for what, config in (CONFIGS | more).items()}


@pytest.fixture(scope="module")
def on_ranks() -> list[dict[str, dict[str, Tensor]]]:
    return run_on_ranks(all_trained, RANKS)


@pytest.mark.parametrize("what", [*CONFIGS, "k_schedule_fsdp", "k_schedule_to_owner"])
def test_ranks_train_as_one_process_does(what: str, on_ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    """Fails when ranks choose other masks, look at their own batch's gradient alone, or scale their shards by it."""
    alone = trained(CONFIGS[what.removesuffix("_fsdp").removesuffix("_to_owner")])
    for name, tensor in on_ranks[0][what].items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5)


def interrupted_and_resumed(rank: int, folder: str, data: str) -> list[str]:
    """Which runs ended with other weights when they went on after their first epoch."""
    here, different = world(), []
    divided = {"k_schedule_fsdp": {**baselines()["k_schedule"], "engine": "fsdp"}}
    for what, options in (baselines() | divided).items():
        config = replace(small_config(Path(folder), Path(data), what, epochs=2), **options)
        config.train = replace(config.train, verify_replicas=1, keep_checkpoints=1)
        whole = replace(config, name=f"{what}_whole", train=replace(config.train, keep_checkpoints=9))
        train(whole, here)
        if here.main:
            newest = checkpoint.newest(whole.run_dir / "checkpoints")
            assert newest is not None
            shutil.copytree(whole.run_dir, config.run_dir)
            shutil.rmtree(config.run_dir / "checkpoints" / newest.name)
            (config.run_dir / "model.safetensors").unlink()
            text = (whole.run_dir / "config.yaml").read_text().replace(f"{what}_whole", what)
            (config.run_dir / "config.yaml").write_text(text)
        barrier(here)
        train(config, here, resume=True)
        mine, theirs = (load_file(c.run_dir / "model.safetensors") for c in (config, whole))
        if not all(torch.equal(mine[name], tensor) for name, tensor in theirs.items()):
            different.append(what)
    return different


def test_a_run_on_ranks_resumes_to_the_same_bits(tmp_path: Path, digits: Path) -> None:
    """Fails when masks that several ranks hold are written or read wrongly, or replicas part on the way."""
    assert run_on_ranks(interrupted_and_resumed, RANKS, str(tmp_path / "runs"), str(digits)) == [[]] * RANKS
