"""Whole runs on two real ranks, started as a user starts them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sfw_dist.config import Config, save_config
from sfw_dist.evaluate.sweep import sweep_run
from sfw_dist.train.run_folder import RunFolder
from tests.support.training import ONE_PROCESS, small_config

ROOT = Path(__file__).parents[2]

RANKS = 3
"""From three on, the sum of a gradient depends on where it stands in a bucket, and BatchNorm's statistics differ."""


@dataclass
class Ended:
    status: int
    stderr: str


def _start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def _run(*arguments: str) -> Ended:
    process = _start(*arguments)
    stderr = process.communicate(timeout=300)[1]
    return Ended(process.returncode, stderr)


def _file(config: Config) -> str:
    path = Path(config.runs_dir).parent / f"{config.name}.yaml"
    path.write_text(yaml.safe_dump(asdict(config)))
    return str(path)


def _train(config: Config, nproc: int, *options: str) -> Ended:
    return _run("-m", "launch.local", "--nproc", str(nproc), "--config", _file(config), *options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Config:
    """A run of two ranks that nobody interrupted."""
    config = small_config(tmp_path_factory.mktemp("two") / "runs", digits, "whole", epochs=30)
    ended = _train(config, RANKS)
    assert ended.status == 0, ended.stderr
    return config


def _weights(config: Config) -> dict[str, torch.Tensor]:
    return load_file(config.run_dir / "model.safetensors")


def test_ranks_see_every_sample_once(whole: Config) -> None:
    events = [json.loads(line) for line in (whole.run_dir / "metrics.jsonl").read_text().splitlines()]
    epochs = [e for e in events if e["event"] == "epoch"]
    assert [e["step"] for e in epochs] == [10 * (i + 1) for i in range(30)]
    assert {e["validation_samples"] for e in epochs} == {136} and events[-1]["samples"] == 451
    assert events[0]["world_size"] == RANKS


def test_gradients_sent_to_owners_alone_make_the_same_run(whole: Config, tmp_path: Path) -> None:
    """Fails when replicas drift apart, or the run is another; sums in another order differ in their last bits."""
    runs = {}
    for grads in ("all_reduce", "reduce_to_owner"):
        optimizer, train = replace(whole.optimizer, grads=grads), replace(whole.train, epochs=2, verify_replicas=3)
        runs[grads] = replace(whole, name=grads, runs_dir=str(tmp_path / "runs"), optimizer=optimizer, train=train)
        ended = _train(runs[grads], RANKS)
        assert ended.status == 0, ended.stderr
    expected = _weights(runs["all_reduce"])
    for name, tensor in _weights(runs["reduce_to_owner"]).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def interrupted(whole: Config) -> tuple[Config, Ended]:
    """The same run, with ctrl-C in its third epoch: the terminal sends SIGINT to the launcher and to both ranks."""
    config = replace(whole, name="interrupted")
    process = _start("-m", "launch.local", "--nproc", str(RANKS), "--config", _file(config))
    assert process.stderr is not None
    said = ""
    while "epoch   2/30" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    os.killpg(process.pid, signal.SIGINT)
    said += process.communicate(timeout=300)[1]
    return config, Ended(process.returncode, said)


def test_ctrl_c_saves_and_says_how_to_go_on(interrupted: tuple[Config, Ended]) -> None:
    """Ranks that stop at different steps would hang; a traceback would hide the command."""
    config, ended = interrupted
    assert ended.status == 130, ended.stderr
    command = ended.stderr.splitlines()[-1]
    assert "--resume auto" in command and str(config.run_dir / "config.yaml") in command, ended.stderr
    assert not (config.run_dir / "model.safetensors").exists()


@pytest.fixture(scope="module")
def moved(interrupted: tuple[Config, Ended]) -> Config:
    """What the interrupted run left, under another name."""
    config = replace(interrupted[0], name="moved")
    shutil.copytree(interrupted[0].run_dir, config.run_dir)
    (config.run_dir / "config.yaml").write_text(save_config(config))
    return config


def test_resumed_it_ends_bitwise_as_if_never_interrupted(
    whole: Config, interrupted: tuple[Config, Ended], moved: Config
) -> None:
    ended = _train(interrupted[0], RANKS, "--resume", "auto")
    assert ended.status == 0, ended.stderr
    mine, theirs = _weights(interrupted[0]), _weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_it_goes_on_at_another_number_of_ranks(moved: Config) -> None:
    """Momentum lives with its owners, and the owners differ: the checkpoint must hold all of it."""
    ended = _train(moved, 1, "--resume", "auto")
    assert ended.status == 0, ended.stderr
    assert "resuming" in ended.stderr
    events = [json.loads(line)["event"] for line in (moved.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert events.count("resume") == 1 and events[-1] == "eval"


def test_evaluation_does_not_depend_on_the_number_of_ranks(whole: Config) -> None:
    """451 test images do not split into two: a padded sampler would count one twice."""
    run = RunFolder(whole.run_dir)
    alone = sweep_run(run, ONE_PROCESS, sparsities=[0.0, 0.8])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = _run(*torchrun, "-m", "sfw_dist.evaluate", str(run.path), "--sparsities", "0,0.8")
    assert ended.status == 0, ended.stderr
    for result in alone:
        together = json.loads((run.prune / f"s{result['sparsity']:.4f}.json").read_text())
        assert (together["samples"], together["top1"]) == (451, result["top1"])
        assert together["loss"] == pytest.approx(result["loss"], rel=1e-6)


def test_a_mistake_is_one_line_and_status_2(whole: Config) -> None:
    """Both ranks meet it; two lines, a traceback or a hang would hide it."""
    ended = _train(replace(whole, name="bad"), 2, "--model.name", "resnet1")
    assert ended.status == 2
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert not (Path(whole.runs_dir) / "bad").exists()
