"""A run's folder: nothing half-written, nothing overwritten, nobody else's, and no secrets in it."""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import stat
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sfw_dist.config import Config, OptimizerConfig, load_config
from sfw_dist.data.record import DataRecord
from sfw_dist.errors import UserError
from sfw_dist.files import replacing, write_json, write_text
from sfw_dist.train.run_folder import RunFolder, environment

CONFIG = Config(name="a")
DIGITS = DataRecord("digits", "c0", ("zero", "one"), (1, 8, 8), (0.3,), (0.35,), {"train": 20, "test": 10})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run's folder, not made yet."""
    return RunFolder(tmp_path / "runs" / "a")


@pytest.fixture
def made(run: RunFolder) -> RunFolder:
    run.create(CONFIG, DIGITS)
    return run


def records(run: RunFolder) -> list[dict[str, Any]]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in run.metrics.read_text().splitlines()]


# Files


@pytest.mark.parametrize("former", [None, b"former"])
def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path: Path, former: bytes | None) -> None:
    """Fails when an error in the middle leaves half a file, loses the former one, or leaves a temporary."""
    path = tmp_path / "file"
    if former is not None:
        path.write_bytes(former)
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half of")
        raise RuntimeError
    left = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    assert left == ({} if former is None else {"file": former})


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    """Fails when a reader can see a file before its last byte is written."""
    path = tmp_path / "file"
    path.write_text("former")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "former"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_json_that_is_none_is_not_written(tmp_path: Path) -> None:
    """Fails when NaN, which JSON readers refuse, gets into a file, or the former file is lost to it."""
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}


def test_text_is_written_as_utf8(tmp_path: Path) -> None:
    """Fails when the encoding depends on the machine."""
    write_text(tmp_path / "file", "‖γ‖\n")
    assert (tmp_path / "file").read_bytes() == "‖γ‖\n".encode()


# Making the folder


def test_create_writes_the_resolved_configuration(made: RunFolder) -> None:
    """Fails when a run cannot be resumed from its own folder."""
    assert load_config(made.config) == CONFIG
    assert RunFolder.existing(made.path).path == made.path
    assert made.checkpoints.is_dir() and made.prune.is_dir()


def test_the_folders_are_their_owners_even_without_a_umask(tmp_path: Path) -> None:
    """Fails when others may replace a run's files, or the run as a whole through a folder above it."""
    umask = os.umask(0)
    try:
        RunFolder(tmp_path / "above" / "runs" / "a").create(CONFIG, DIGITS)
    finally:
        os.umask(umask)
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert len(folders) >= 5
    for folder in folders:
        assert not folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), folder


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    """Fails when another folder is taken for a run's, to crash later."""
    with pytest.raises(UserError, match=r"not a run's folder .*: train one with") as raised:
        RunFolder.existing(tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


# Whether a folder may be used


@pytest.mark.parametrize("resume", [False, True])
def test_a_new_or_empty_folder_is_free(run: RunFolder, resume: bool) -> None:
    """Fails when a first start needs another option than a later one."""
    run.check_free_for(CONFIG, resume)
    run.path.mkdir(parents=True)
    run.check_free_for(CONFIG, resume)
    assert os.listdir(run.path) == []


def test_the_same_configuration_may_only_be_resumed(made: RunFolder) -> None:
    """Fails when a second start overwrites a run, or a resume is refused."""
    made.check_free_for(Config(name="a"), resume=True)
    with pytest.raises(UserError, match="exists: resume it with --resume auto, or choose another --name"):
        made.check_free_for(Config(name="a"), resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_another_configuration_is_refused_by_its_difference(made: RunFolder, resume: bool) -> None:
    """Fails when a run goes on under another learning rate than its config.yaml says."""
    other = Config(name="a", optimizer=OptimizerConfig(lr=0.5))
    with pytest.raises(UserError, match=r"optimizer\.lr is 0\.5, was 1\.0.*choose another --name"):
        made.check_free_for(other, resume)


@pytest.mark.parametrize("resume", [False, True])
def test_a_foreign_folder_or_file_is_refused(run: RunFolder, resume: bool) -> None:
    """Fails when a mistyped --runs_dir mixes a run into somebody's files."""
    run.path.parent.mkdir()
    run.path.write_text("a file")
    with pytest.raises(UserError, match="not a run's folder: choose another"):
        run.check_free_for(CONFIG, resume)
    run.path.unlink()
    run.path.mkdir()
    (run.path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not a run's folder: choose another"):
        run.check_free_for(CONFIG, resume)


# The log


def test_log_appends_json_lines_in_which_no_number_is_infinite(made: RunFolder) -> None:
    """Fails when a diverged loss makes metrics.jsonl unreadable, or a record replaces the one before."""
    made.log("train", step=1, loss=0.5)
    made.log("train", step=2, loss=math.nan, gap=math.inf, lr=-math.inf, note=None)
    first, second = records(made)
    assert (first["event"], first["step"], first["loss"]) == ("train", 1, 0.5)
    assert [second[key] for key in ("loss", "gap", "lr", "note")] == [None] * 4
    assert 0 < first["time"] <= second["time"]


@pytest.mark.parametrize("written", ['{"event": "train"}\n{"event": "tr', '{"event": "train"}\n', "{", ""])
def test_resuming_cuts_off_an_unfinished_line(made: RunFolder, written: str) -> None:
    """Fails when the first record after a kill is glued to half a line, and both are lost."""
    made.metrics.write_text(written)
    made.create(CONFIG, DIGITS)
    made.log("resume", step=3)
    assert [record["event"] for record in records(made)] == ["train"] * written.count("\n") + ["resume"]


def test_the_heartbeat_is_the_newest_alone(made: RunFolder) -> None:
    """Fails when a monitor reads an old beat, or several."""
    made.beat(step=1, epoch=1)
    made.beat(step=2)
    beat = json.loads((made.path / "heartbeat.json").read_text())
    assert beat.pop("time") > 0
    assert beat == {"step": 2}


def test_the_environment_holds_neither_variables_nor_the_host_name(
    made: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when a published run gives away a token or the machine it ran on."""
    fake = os.uname_result(("Linux", "secret-host", "6.1.0", "#1", "x86_64"))
    monkeypatch.setattr(os, "uname", lambda: fake)
    monkeypatch.setattr(platform, "uname", lambda: platform.uname_result(*fake))
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host")
    monkeypatch.setenv("HOSTNAME", "secret-host")
    monkeypatch.setenv("SOME_TOKEN", "secret-token")
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = environment()
    assert "secret" not in json.dumps(found)
    assert found["world_size"] == 4
    assert torch.__version__.startswith(found["torch"])
    assert found.keys() == json.loads((made.path / "environment.json").read_text()).keys()


# The weights


def test_weights_come_back_bit_by_bit(made: RunFolder) -> None:
    """Fails when the published weights are not those measured; strides and gradients must not disturb."""
    state = {
        "conv.weight": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        "bf16": torch.randn(5).bfloat16(),
        "transposed": torch.nn.Parameter(torch.randn(3, 4)).t(),
        "bn.num_batches_tracked": torch.tensor(7),
    }
    made.save_weights(state)
    loaded = made.load_weights()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_weights_that_share_memory_have_all_their_names(made: RunFolder) -> None:
    """Fails when a training with tied weights ends in an error of safetensors, or a name is not in the file."""
    flat = torch.randn(12)
    state = {"a": flat.view(3, 4), "b": flat.view(3, 4), "flat": flat, "part": flat[4:8], "turned": flat.view(3, 4).t()}
    made.save_weights(state)
    loaded = made.load_weights()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_missing_or_damaged_weights_are_named_in_one_line(made: RunFolder, content: bytes | None) -> None:
    """Fails when evaluating an unfinished run, or one whose weights are damaged, ends in a traceback."""
    if content is not None:
        made.weights.write_bytes(content)
    with pytest.raises(UserError) as raised:
        made.load_weights()
    message = str(raised.value)
    assert "\n" not in message and str(made.path) in message and "--resume auto" in message


# The data


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"classes": ("zero", "two")}, "class 1 is 'two', was 'one'"),
        ({"classes": ("zero", "one", "two")}, "3 classes, were 2"),
        ({"image_shape": (3, 8, 16)}, "images of 3×8×16, were of 1×8×8"),
        ({"counts": {"train": 21, "test": 10}}, "21 train images, were 20"),
        ({"mean": (0.4,)}, "mean 0.4, was 0.3"),
        ({"std": (0.4,)}, "std 0.4, was 0.35"),
        ({}, "other pixels or labels"),
    ],
)
@pytest.mark.parametrize("kept", ["data.json", "model.safetensors"])
def test_other_data_are_refused_by_what_differs(made: RunFolder, change: dict[str, Any], told: str, kept: str) -> None:
    """Fails when a network is measured on renamed classes or another size without a word."""
    made.save_weights({"weight": torch.zeros(2)})
    if kept != "data.json":
        made.data.unlink()
    made.check_data(replace(DIGITS, name="moved"))
    with pytest.raises(UserError) as raised:
        made.check_data(replace(DIGITS, content="c1", **change))
    message = str(raised.value)
    assert told in message and str(made.path) in message and "\n" not in message


def test_weights_tell_other_programs_their_data(made: RunFolder) -> None:
    """Fails when somebody who has model.safetensors alone cannot know classes and normalisation."""
    made.save_weights({"weight": torch.zeros(2)})
    with safe_open(made.weights, framework="pt") as file:
        data = json.loads(file.metadata()["data"])
    assert data["classes"] == ["zero", "one"] and data["mean"] == [0.3] and data["image_shape"] == [1, 8, 8]
    content = made.weights.read_bytes()
    made.save_weights({"weight": torch.zeros(2)})
    assert made.weights.read_bytes() == content, "equal weights are equal files"


def test_a_run_of_earlier_versions_is_not_compared(made: RunFolder) -> None:
    """Fails when a run without a record of its data cannot be resumed or measured."""
    made.data.unlink()
    made.check_data(replace(DIGITS, content="c1"))
    made.create(CONFIG, DIGITS)
    with pytest.raises(UserError):
        made.check_data(replace(DIGITS, content="c1"))


def test_a_damaged_record_is_named(made: RunFolder) -> None:
    """Fails when a flipped byte in data.json ends in a traceback."""
    for text in ("{", "[]", '{"name": 1}'):
        made.data.write_text(text)
        with pytest.raises(UserError, match=r"data\.json is damaged"):
            made.check_data(DIGITS)


def test_the_command_of_a_run_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a run that was started by ``python -m`` is recorded as ``__main__.py``."""
    started = ModuleType("__main__")
    started.__spec__ = ModuleSpec("sfw_dist.train.__main__", None)
    monkeypatch.setitem(sys.modules, "__main__", started)
    monkeypatch.setattr(sys, "argv", ["/somewhere/__main__.py", "--name", "x"])
    assert environment()["command"] == ["python", "-m", "sfw_dist.train", "--name", "x"]
    started.__spec__ = None
    assert environment()["command"] == ["__main__.py", "--name", "x"]
