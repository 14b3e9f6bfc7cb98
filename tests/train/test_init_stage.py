"""SFW-Init in a run: before its first step alone, in the data's order, and repeated when it was cut off."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfw_dist.config import Config, InitConfig
from sfw_dist.errors import UserError
from sfw_dist.train import trainer as training
from sfw_dist.train.init_stage import HalfBatches
from sfw_dist.train.inputs import check_input
from sfw_dist.train.logger import Logger
from tests.support.training import ONE_PROCESS, small_config


@pytest.fixture
def config(tmp_path: Path, digits: Path) -> Config:
    return replace(small_config(tmp_path / "runs", digits, epochs=1), init=InitConfig(steps=10))


def train(config: Config, *, resume: bool = False) -> int:
    return training.train(config, ONE_PROCESS, resume=resume)


def events(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(config: Config) -> dict[str, Tensor]:
    return load_file(config.run_dir / "model.safetensors")


def same(one: Config, other: Config) -> bool:
    mine, theirs = weights(one), weights(other)
    return all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_fresh_run_learns_scales_and_says_so(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when the scales are not logged by name, or are learned and then not trained from."""
    plain = replace(config, name="plain", init=InitConfig())
    assert train(config) == train(plain) == 0
    found = events(config)
    assert [e["event"] for e in found][:4] == ["init", "init", "init", "start"]
    assert [e.get("step") for e in found[:3]] == [4, 8, 10] and found[0]["loss"] > 0
    assert found[2]["scales"]["0.weight"] != 1 and len(found[2]["scales"]) == 11
    assert "SFW-Init: 11 tensors scaled by" in capsys.readouterr().err
    assert events(plain)[0]["event"] == "start" and not same(config, plain)


def test_interrupted_in_it_a_run_begins_again(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when ctrl-C is ignored then, ends in a traceback, or leaves half-learned scales to the next attempt."""
    whole = replace(config, name="whole")
    assert train(whole) == 0
    original = Logger.init_step

    def init_step(self: Logger, step: int, loss: float) -> None:
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        original(self, step, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Logger, "init_step", init_step)
        assert train(config) == 130
    said = capsys.readouterr().err
    assert "interrupted before the first checkpoint" in said and "--resume auto" in said.splitlines()[-1]
    assert events(config)[-1]["checkpoint"] is None
    assert train(config, resume=True) == 0
    assert same(config, whole)


def test_a_run_that_goes_on_is_not_scaled_again(config: Config) -> None:
    """Fails when a resume changes trained weights."""
    assert train(config) == 0
    before = weights(config)
    (config.run_dir / "model.safetensors").unlink()
    assert train(config, resume=True) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(config).items())
    assert [e["event"] for e in events(config)].count("init") == 3


class Numbers:
    """Two epochs of two batches; an image is its number."""

    description, samples, epoch = "", 8, 0

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        assert state["batch"] == 0
        self.epoch = state["epoch"]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for at in (0, 8):
            part = torch.arange(at, at + 8)[self.rank :: self.world_size] + 100 * self.epoch
            yield part, part


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_half_batches_are_the_same_at_any_number_of_ranks(world_size: int) -> None:
    """Fails when another number of ranks learns from other images, or a second pass sees the first one's order."""
    ranks = [HalfBatches(Numbers(rank, world_size), lambda x, y, n: (x + 1000 * n, y)) for rank in range(world_size)]  # type: ignore[arg-type]
    for epoch in range(2):
        halves = [[batch[0] for batch in rank] for rank in ranks]
        for number, parts in enumerate(zip(*halves, strict=True)):
            shift = 100 * epoch + 1000 * (2 * epoch + number // 2)
            assert sorted(torch.cat(parts).tolist()) == [x + shift for x in range(4 * number, 4 * number + 4)]


def test_a_batch_of_one_image_a_rank_cannot_be_halved(config: Config) -> None:
    config.data.batch_size = 4
    with pytest.raises(UserError, match=r"batch_size 4 .* 4 ranks.*write 8, or init\.steps 0"):
        check_input(config, 0, 4, resume=False)
