"""Training in one process: the run's folder, resuming, and what bad input says."""

from __future__ import annotations

import json
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sfw_dist.config import Config, load_config
from sfw_dist.errors import UserError
from sfw_dist.files import file_lock
from sfw_dist.train import checkpoint
from sfw_dist.train import trainer as training
from sfw_dist.train.__main__ import main
from sfw_dist.train.strategies import Strategy
from tests.support.training import ONE_PROCESS, small_config


@pytest.fixture
def config(tmp_path: Path, digits: Path) -> Config:
    return small_config(tmp_path / "runs", digits)


def _train(config: Config, *, resume: bool = False) -> int:
    return training.train(config, ONE_PROCESS, resume=resume)


def _events(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ctrl-C in the given step, counted from now."""
    taken = 0
    original: Callable[..., torch.Tensor] = Strategy.train_step

    def train_step(self: Strategy, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == steps:
            signal.raise_signal(signal.SIGINT)
        return original(self, images, labels)

    monkeypatch.setattr(Strategy, "train_step", train_step)


def _same_weights(first: Path, second: Path) -> bool:
    mine, theirs = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_run_leaves_the_files_that_others_read(config: Config) -> None:
    assert _train(config) == 0
    run = config.run_dir
    assert load_config(run / "config.yaml") == config
    assert json.loads((run / "environment.json").read_text())["torch"] == torch.__version__.split("+")[0]
    assert json.loads((run / "heartbeat.json").read_text())["epoch"] == 2
    assert checkpoint.pointed(run / "checkpoints", "latest") == run / "checkpoints" / "epoch_0002.step_000020"
    assert checkpoint.pointed(run / "checkpoints", "best") is not None
    events = _events(config)
    assert [e["event"] for e in events] == ["start", *["train"] * 2, "epoch", *["train"] * 3, "epoch", "eval"]
    assert all(e["gap"] > 0 and 0 < e["gamma"] <= 1 and e["effective_lr"] > 0 for e in events if e["event"] == "train")
    assert events[-1]["split"] == "test" and events[-1]["samples"] == 451
    assert {e["validation_samples"] for e in events if e["event"] == "epoch"} == {136}
    assert any((run / "tensorboard").iterdir())
    assert not [
        path for path in run.rglob("*") if path.name.startswith(".") and path.name not in (".metadata", ".lock")
    ]


@pytest.mark.parametrize("optimizer", ["sfw", "sgd"])
@pytest.mark.parametrize("steps", [1, 13, 20])
def test_an_interrupted_run_goes_on_bitwise(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], optimizer: str, steps: int
) -> None:
    """In the middle of the first or second epoch, or after its last step; momentum, order, schedule and loss survive.

    Twelve epochs would be needed for the dynamic rule to act; its state is checked in test_schedule.
    """
    config = replace(config, optimizer=replace(config.optimizer, name=optimizer, lr=0.3), train=config.train)
    config.train.epochs = 3
    whole = replace(config, name="whole")
    assert _train(whole) == 0
    with monkeypatch.context() as patch:
        _interrupt_after(patch, steps)
        assert _train(config) == 130
    said = capsys.readouterr().err
    assert "--resume auto" in said and str(config.run_dir / "config.yaml") in said
    assert not (config.run_dir / "model.safetensors").exists()
    assert _train(config, resume=True) == 0
    assert _same_weights(config.run_dir, whole.run_dir)
    last = [[e["train_loss"] for e in _events(c) if e["event"] == "epoch"][-1] for c in (config, whole)]
    assert last[0] == last[1]


def test_it_says_by_which_engine_to_go_on(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder's file names the engine that the run began on, by which a network that has outgrown it would fail."""
    for engine, said in (("ddp", "config.yaml --resume auto"), ("fsdp", "config.yaml --engine fsdp --resume auto")):
        with monkeypatch.context() as patch:
            _interrupt_after(patch, 2)
            assert _train(replace(config, engine=engine), resume=engine == "fsdp") == 130
        assert said in capsys.readouterr().err


def test_augmented_and_mixed_training_goes_on_bitwise(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixing, cutout or boxes that depend on what was drawn before: a resumed run trains on other images."""
    data = replace(
        config.data, backend="ram", crop_padding=0, random_resized_crop=0.3, cutout=2, mixup=0.3, cutmix=1.0,
        label_smoothing=0.1,
    )  # fmt: skip
    config = replace(config, data=data)
    whole, plain = replace(config, name="whole"), replace(config, name="plain", data=replace(data, cutmix=0.0))
    assert _train(whole) == _train(plain) == 0
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 13)
        assert _train(config) == 130
    assert _train(config, resume=True) == 0
    assert _same_weights(config.run_dir, whole.run_dir)
    assert not _same_weights(plain.run_dir, whole.run_dir)


def test_a_run_is_repeated_from_its_own_configuration(config: Config) -> None:
    """The resolved file must say everything: a default that is missing in it would let the copy differ."""
    assert _train(config) == 0
    arguments = ["--config", str(config.run_dir / "config.yaml"), "--name", "again"]
    assert main(arguments) == 0
    assert _same_weights(config.run_dir, config.run_dir.parent / "again")


def test_a_finished_run_is_left_alone(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(config) == 0
    before = (config.run_dir / "metrics.jsonl").read_bytes()
    assert _train(config, resume=True) == 0
    assert "already" in capsys.readouterr().err
    assert (config.run_dir / "metrics.jsonl").read_bytes() == before


def test_the_newest_complete_checkpoint_counts_when_a_write_was_cut(config: Config) -> None:
    """A node that died while writing leaves a dotted folder; a resume must take the one before it."""
    whole = replace(config, name="whole")
    assert _train(whole) == 0
    assert _train(config) == 0
    folder = config.run_dir / "checkpoints"
    (folder / "epoch_0002.step_000020").rename(folder / ".epoch_0002.step_000020")
    (config.run_dir / "model.safetensors").unlink()
    assert _train(config, resume=True) == 0
    assert _same_weights(config.run_dir, whole.run_dir)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"channels_last": True}])
def test_precision_and_layout_train(config: Config, options: dict[str, Any]) -> None:
    config.train = replace(config.train, epochs=3, **options)
    config.optimizer.lr = 0.5
    assert _train(config) == 0
    losses = [e["train_loss"] for e in _events(config) if e["event"] == "epoch"]
    assert losses[-1] < losses[0]


def test_what_does_not_change_the_weights_may_change_on_resume(config: Config) -> None:
    """Data that moved, or another log interval, must not lock a run."""
    assert _train(config) == 0
    (config.run_dir / "model.safetensors").unlink()
    config.train.log_every = 3
    config.data.eval_batch_size = 50
    assert _train(config, resume=True) == 0


def test_without_a_validation_split(config: Config) -> None:
    config.data.validation_fraction = 0.0
    assert _train(config) == 0
    assert checkpoint.pointed(config.run_dir / "checkpoints", "best") is None


def test_a_diverging_run_says_so(config: Config) -> None:
    config.optimizer = replace(config.optimizer, name="sgd", lr=1e30)
    with pytest.raises(UserError, match=r"lower optimizer\.lr"):
        _train(config)


class TestBadInput:
    """One line, exit status 2, and no run folder."""

    def _fails(self, config: Config, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
        file = config.run_dir.parent / "given.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(asdict(config)))
        before = sorted(file.parent.rglob("*"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert main(["--config", str(file), *overrides]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert sorted(file.parent.rglob("*")) == before
        return error

    @pytest.mark.parametrize(
        ("overrides", "parts"),
        [
            (["--data.name", "imagenot"], ["'imagenot'", "digits"]),
            (["--data.name", "fashion_mnist"], ["not prepared", "python -m sfw_dist.data prepare fashion_mnist"]),
            (["--data.batch_size", "5000"], ["5000", "smaller batch"]),
            (["--model.name", "resnet1"], ["resnet1", "resnet18"]),
            (["--optimizer.constraint.k_frac", "5"], ["k_frac", "5.0", "write 0.05 for 5 %"]),
            (["--optimizer.constraint.tau", "-1"], ["tau", "-1"]),
            (["--optimizer.lr", "0"], ["optimizer.lr", "0", "write 1.0"]),
            (["--optimizer.learning_rate", "1"], ["optimizer.learning_rate"]),
        ],
        ids=lambda value: value[-1] if isinstance(value, list) else None,
    )
    def test_values(
        self, config: Config, capsys: pytest.CaptureFixture[str], overrides: list[str], parts: list[str]
    ) -> None:
        error = self._fails(config, capsys, *overrides)
        assert all(part in error for part in parts), error

    def test_corrupt_ffcv_file(self, config: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        """A header of zeros with the right length; FFCV itself would crash or hang."""
        pytest.importorskip("ffcv")
        root = tmp_path / "damaged"
        shutil.copytree(config.data.root, root)
        beton = root / "digits" / "train.beton"
        with beton.open("r+b") as file:
            file.write(bytes(4096))
        error = self._fails(config, capsys, "--data.root", str(root), "--data.backend", "ffcv")
        assert str(beton) in error and "prepare" in error

    def test_folder_with_another_configuration(self, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
        assert _train(config) == 0
        capsys.readouterr()
        error = self._fails(config, capsys, "--optimizer.lr", "0.25", "--resume", "auto")
        assert "optimizer.lr is 0.25, was 1.0" in error

    def test_folder_in_use(self, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
        """Two processes wrote into one folder, and both ended well."""
        config.run_dir.mkdir(parents=True)
        with file_lock(config.run_dir / ".lock"):
            assert "another process" in self._fails(config, capsys)

    def test_folder_that_cannot_be_made(self, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--name", "x", "--data.root", config.data.root, "--runs_dir", "/dev/null/runs"]) == 2
        error = capsys.readouterr().err
        assert "/dev/null" in error and error.count("\n") == 1

    def test_configuration_of_a_run_that_lies_elsewhere(
        self, config: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        """A copied run was silently trained anew, from its first step, in another folder."""
        assert _train(config) == 0
        shutil.copytree(config.run_dir, tmp_path / "moved" / "copy")
        capsys.readouterr()
        moved = str(tmp_path / "moved" / "copy" / "config.yaml")
        assert main(["--config", moved, "--resume", "auto"]) == 2
        assert f"--runs_dir {tmp_path / 'moved'} --name copy" in capsys.readouterr().err

    def test_folder_without_resume(self, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
        assert _train(config) == 0
        capsys.readouterr()
        assert "--resume auto" in self._fails(config, capsys)

    def test_checkpoint_of_another_model(self, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
        """A checkpoint put into another run's folder by hand: the configuration agrees, the tensors do not."""
        other = replace(config, name="other", model=replace(config.model, width=0.125))
        assert _train(other) == 0
        assert _train(config) == 0
        shutil.rmtree(config.run_dir / "checkpoints")
        shutil.copytree(other.run_dir / "checkpoints", config.run_dir / "checkpoints")
        (config.run_dir / "model.safetensors").unlink()
        capsys.readouterr()
        error = self._fails(config, capsys, "--resume", "auto")
        assert "another model" in error and "epoch_0002.step_000020" in error
