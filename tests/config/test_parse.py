"""Run files: one place for defaults, inheritance, the command line on top, and errors that name the mistake."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from sfw_dist.config import (
    Config,
    ConstraintConfig,
    DataConfig,
    OptimizerConfig,
    PruneConfig,
    ScheduleConfig,
    load_config,
    read_yaml,
    save_config,
)
from tests.support.config_files import Write, error_of, leaves, parse

ROOT = Path(__file__).parents[2]

# Defaults


def test_a_file_with_only_a_name_takes_the_dataclasses_defaults(write: Write) -> None:
    """Fails when a default is repeated in the parser and differs there."""
    assert parse("--config", write("name: a\n")) == Config(name="a")


def test_the_command_line_alone_takes_the_dataclasses_defaults() -> None:
    """Fails when a run without a file has defaults of its own."""
    assert parse("--name", "a") == Config(name="a")


def test_an_empty_file_is_named_after_itself(write: Write) -> None:
    """Fails when a run needs a ``name:`` although its file has one."""
    assert load_config(write("", "digits_x.yaml")) == Config(name="digits_x")


def test_a_partial_section_keeps_its_other_defaults(write: Write) -> None:
    """Fails when a section in the file replaces the whole section of defaults."""
    config = load_config(write("name: a\noptimizer: {constraint: {k_frac: 0.01}}\n"))
    assert config == Config(name="a", optimizer=OptimizerConfig(constraint=ConstraintConfig(k_frac=0.01)))


# Inheritance


def test_three_files_inherit_key_by_key_each_relative_to_itself(write: Write) -> None:
    """Fails when bases are looked up from the working directory, sections are replaced, or the order is reversed."""
    write("seed: 1\noptimizer: {lr: 0.1, momentum: 0.1, constraint: {k_frac: 0.1, k_min: 1}}\n", "deep/root.yaml")
    write("base: deep/root.yaml\nseed: 2\noptimizer: {lr: 0.2, constraint: {k_frac: 0.2}}\n", "middle.yaml")
    leaf = write("base: ../middle.yaml\nseed: 3\nprune: {sparsities: [0.5]}\n", "leaf/leaf.yaml")
    assert load_config(leaf) == Config(
        name="leaf",
        seed=3,
        optimizer=OptimizerConfig(lr=0.2, momentum=0.1, constraint=ConstraintConfig(k_frac=0.2, k_min=1)),
        prune=PruneConfig(sparsities=[0.5]),
    )


def test_a_list_replaces_the_one_of_its_base(write: Write) -> None:
    """Fails when lists are joined: a base's sparsities could then never be dropped."""
    write("prune: {sparsities: [0.1, 0.2]}\n", "base.yaml")
    assert read_yaml(write("base: base.yaml\nprune: {sparsities: [0.9]}\n")) == {"prune": {"sparsities": [0.9]}}


@pytest.mark.parametrize("files", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "b"}])
def test_inheriting_in_a_circle_is_an_error(write: Write, files: dict[str, str]) -> None:
    """Fails when a circle of bases recurses until Python gives up."""
    for name, base in files.items():
        write(f"base: {base}.yaml\n", f"{name}.yaml")
    message = error_of("--config", write(f"base: {files['a']}.yaml\n", "a.yaml"))
    assert "inherits from itself" in message and "remove one base" in message


def test_a_base_shared_by_two_branches_of_a_chain_is_no_circle(write: Write) -> None:
    """Fails when visited files are remembered beyond their own chain."""
    base = write("seed: 1\n", "base.yaml")
    for name in ("one.yaml", "two.yaml"):
        assert load_config(write("base: base.yaml\n", name)).seed == load_config(base).seed


def test_a_missing_base_is_named(write: Write) -> None:
    """Fails when the message names the file that inherits, which exists."""
    message = error_of("--config", write("base: nowhere.yaml\n"))
    assert "nowhere.yaml" in message and "No such file" in message


# The command line


@pytest.mark.parametrize("override_first", [True, False])
def test_an_override_beats_the_file_wherever_it_stands(write: Write, override_first: bool) -> None:
    """Fails when ``--config`` after an override wipes it out."""
    file, override = ["--config", str(write("optimizer: {lr: 2, momentum: 0.5}\n"))], ["--optimizer.lr", "0.5"]
    config = parse(*(override + file if override_first else file + override))
    assert (config.optimizer.lr, config.optimizer.momentum) == (0.5, 0.5)


def test_options_may_be_joined_with_an_equals_sign(write: Write) -> None:
    """Fails when the file is looked for only in ``--config FILE``."""
    config = parse(f"--config={write('seed: 3')}", "--optimizer.lr=0.5", "--name=b")
    assert (config.seed, config.optimizer.lr, config.name) == (3, 0.5, "b")


def test_lists_and_null_on_the_command_line(write: Write) -> None:
    """Fails when a list of numbers is taken as text, or an inherited tau cannot be taken back."""
    file = write("optimizer: {constraint: {tau: 3}}\n")
    lists = ["--prune.sparsities", "[0.5, 0.9]", "--schedule.milestones", "[5e-1]"]
    size = ["--optimizer.constraint.tau", "null", "--optimizer.constraint.radius", "2"]
    config = parse("--config", file, *lists, *size)
    assert config.prune.sparsities == [0.5, 0.9]
    assert config.schedule.milestones == [0.5]
    assert (config.optimizer.constraint.tau, config.optimizer.constraint.radius) == (None, 2.0)


def test_a_number_in_scientific_notation_is_a_number(write: Write) -> None:
    """Fails when ``1e-4`` stays the text that YAML 1.1 takes it for."""
    file = write("optimizer: {lr: 1e-4, constraint: {tau: 1e1}}\nschedule: {milestones: [1e-1]}\n")
    config = parse("--config", file, "--optimizer.weight_decay", "5e-4")
    assert (config.optimizer.lr, config.optimizer.constraint.tau) == (1e-4, 10.0)
    assert (config.schedule.milestones, config.optimizer.weight_decay) == ([0.1], 5e-4)


@pytest.mark.parametrize("option", ["--optimizer.constaint", "--optimizer.l", "--conf", "--learning_rate", "stray"])
def test_an_unknown_option_is_an_error(write: Write, option: str) -> None:
    """Fails when a misspelt or shortened option is passed over; ``--conf FILE`` used to train without the file."""
    message = error_of("--config", write(""), option, "0.5")
    assert option in message and "see --help" in message


def test_config_without_a_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when argparse prints its own usage and ends the process."""
    assert "--config" in error_of("--config")
    assert capsys.readouterr().err == ""


def test_a_run_without_name_or_file_is_an_error() -> None:
    """Fails when a run called None is trained."""
    assert "--name NAME" in error_of()


@pytest.mark.slow
def test_help_lists_every_option_with_its_default_and_examples() -> None:
    """Fails when ``python -m sfw_dist.train --help`` leaves an option out, hides a default or does not exit with 0."""
    command = [sys.executable, "-m", "sfw_dist.train", "--help"]
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    options, _, examples = " ".join(shown.stdout.partition("options:")[2].split()).partition("examples:")
    assert "python -m sfw_dist.train --config configs/" in examples
    for key, default in leaves(asdict(Config(name="a"))):
        _, found, entry = options.partition(f" --{key} ")
        assert found, f"--{key} is not in the help"
        if key != "name" and not isinstance(default, list):
            text = json.dumps(default).strip('"')
            assert f"default: {text})".lower() in entry.partition(" --")[0].lower(), key


# Saving


@pytest.mark.parametrize(
    "config",
    [
        Config(name="defaults"),
        Config(name="maximum", optimizer=OptimizerConfig(constraint=ConstraintConfig(set="lp", p=math.inf))),
        Config(name="radius", optimizer=OptimizerConfig(constraint=ConstraintConfig(set="k_support", radius=1e-7))),
        Config(name="empty", prune=PruneConfig(sparsities=[]), schedule=ScheduleConfig(milestones=[])),
        Config(name="007", runs_dir="null", data=DataConfig(root="a: 'b' # é", validation_fraction=0.0, flip=True)),
    ],
    ids=lambda config: config.name,
)
def test_a_saved_configuration_loads_as_itself(write: Write, config: Config) -> None:
    """Fails when a resumed run finds another configuration than it wrote."""
    assert load_config(write(save_config(config))) == config


def test_a_configuration_from_before_there_were_engines_means_ddp(write: Write) -> None:
    """Fails when old runs can no longer be resumed."""
    saved = save_config(Config(name="a", seed=3))
    old = yaml.safe_load(saved)
    del old["engine"], old["fsdp"], old["deepspeed"], old["train"]["accumulate"]
    assert load_config(write(yaml.safe_dump(old))) == Config(name="a", seed=3)


# Mistakes


@pytest.mark.parametrize(
    ("text", "key", "value", "remedy"),
    [
        ("optimizer: {lr: fast}", "optimizer.lr", "fast", "see --help"),
        ("optimizer: {lr: }", "optimizer.lr", "null", "write a value"),
        ("optimizer: {constaint: {tau: 1}}", "optimizer.constaint", "", "did you mean optimizer.constraint?"),
        ("optimiser: {lr: 1}", "unknown key optimiser", "", "did you mean optimizer?"),
        ("zebra: 1", "unknown key zebra", "", "known here: name, runs_dir"),
        ("data: 3", "data is a section", "3", "write 'key: value' lines"),
        ("data:", "data is a section", "None", "write 'key: value' lines"),
        ("train: {epochs: 1.5}", "train.epochs", "1.5", "see --help"),
        ("train: {precision: }", "train.precision", "null", "remove the line"),
        ("prune: {sparsities: 0.5}", "prune.sparsities", "0.5", "see --help"),
    ],
)
def test_a_bad_value_is_refused_in_one_line(write: Write, text: str, key: str, value: str, remedy: str) -> None:
    """Fails when a mistake in a file is passed over, crashes later, or its message lacks key, value or remedy."""
    message = error_of("--config", write(text))
    for part in (key, value, remedy):
        assert part in message


def test_a_bad_value_on_the_command_line_is_refused(write: Write) -> None:
    """Fails when overrides escape the checks of the file."""
    message = error_of("--config", write(""), "--optimizer.constraint.k_frac", "5")
    assert "k_frac" in message and "write 0.05" in message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a: [", "is not valid YAML"),
        (b"- 1\n- 2\n", "holds a list"),
        (b"just text", "holds a str"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"!!python/object/apply:os.getcwd []", "is not valid YAML"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_run_file_is_named(write: Write, content: bytes | None, problem: str) -> None:
    """Fails when a wrong file ends in a parser's traceback, or its tags run code."""
    path = write("", "wrong.yaml")
    path.unlink() if content is None else path.write_bytes(content)
    message = error_of("--config", path)
    assert str(path) in message and problem in message


def test_paths_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a run makes a folder named ~ in the present one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("runs_dir: ~/runs\ndata:\n  root: ~/data\n  stage_dir: ~/stage\n")
    (tmp_path / "x.yaml").write_text("base: ~/base.yaml\n")
    config = parse("--config", "~/x.yaml")
    assert (config.runs_dir, config.data.root) == (f"{tmp_path}/runs", f"{tmp_path}/data")
    assert config.data.stage_dir == f"{tmp_path}/stage"
    assert parse("--name", "x", "--data.root=~/other").data.root == f"{tmp_path}/other"
    assert parse("--name", "x", "--data.root", "./~/other").data.root == "./~/other"
