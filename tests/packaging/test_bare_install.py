"""With torch and numpy alone the library works, and each command says which extra it needs."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import sfw_dist
from tests.support import bare_script
from tests.support.bare_environment import hidden_packages, run_bare

COMMANDS = {
    "sfw_dist.train": "train",
    "sfw_dist.evaluate": "train",
    "sfw_dist.report": "train",
    "sfw_dist.data": "train",
    "launch.local": "train",
    "launch.train": "slurm",
    "launch.prune_array": "slurm",
    "launch.collect": "slurm",
    "launch.status": "slurm",
    "launch.cancel": "slurm",
    "launch.retry": "slurm",
}
"""Every command, and the extra that it needs."""

ROOT = Path(sfw_dist.__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TRAIN_EXTRA = tuple(Requirement(line).name for line in EXTRAS["train"])


def test_the_environment_is_bare(tmp_path: Path) -> None:
    """The tests below pass because packages are not hidden, or fail because torch's own are."""
    hidden = hidden_packages("torch", "numpy")
    assert {"yaml", "jsonargparse", "numba", "PIL", "deepspeed", "ffcv", "submitit", "matplotlib"} <= set(hidden)
    assert not {"torch", "numpy", "sympy", "typing_extensions", "filelock", "sfw_dist", "launch"} & set(hidden)
    script = "import torch, numpy, importlib.util; print(importlib.util.find_spec('yaml')); import yaml"
    done = run_bare(tmp_path, "-c", script)
    assert done.returncode == 1 and done.stdout == "None\n"
    assert "ModuleNotFoundError: No module named 'yaml'" in done.stderr


def test_every_public_name_can_be_imported(tmp_path: Path) -> None:
    """A module of the library imports a package that the library does not require."""
    names = ", ".join(name for name in sfw_dist.__all__ if name != "__version__")
    done = run_bare(tmp_path, "-W", "error::ImportWarning", "-c", f"from sfw_dist import {names}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("what", "told"), [("train", "trained"), ("ddp", "trained on two ranks")])
def test_a_script_trains(what: str, told: str, tmp_path: Path) -> None:
    """An optional package is imported while training, pruning, or communicating between ranks."""
    done = run_bare(tmp_path, bare_script.__file__, what)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == told


def test_every_command_is_tried() -> None:
    """A command is added that no test below runs."""
    with_main = {
        path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__main__").replace("/", ".")
        for package in ("sfw_dist", "launch")
        for path in (ROOT / package).rglob("*.py")
        if _is_command(path)
    }
    assert with_main - {"launch.cli", "launch.job"} == set(COMMANDS)  # cli starts the others, job is started by jobs


def _is_command(path: Path) -> bool:
    tests = (node.test for node in ast.parse(path.read_text()).body if isinstance(node, ast.If))
    return any(ast.unparse(test) == "__name__ == '__main__'" for test in tests)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_the_extra_that_it_needs(command: str, tmp_path: Path) -> None:
    """A traceback, exit status 1, or a package name that is no answer to what to install."""
    done = run_bare(tmp_path, "-m", command, "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {command} needs ") and done.stderr.count("\n") == 1
    assert done.stderr.endswith(f": pip install 'sfw-dist[{COMMANDS[command]}]'\n")


def test_sfw_dist_verb_names_the_extra_too(tmp_path: Path) -> None:
    """``sfw-dist train`` ends in a traceback where ``python -m sfw_dist.train`` does not; or its own help does."""
    assert run_bare(tmp_path, "-m", "launch.cli", "--help").returncode == 0
    done = run_bare(tmp_path, "-m", "launch.cli", "train", "--help")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.endswith(": pip install 'sfw-dist[train]'\n")


def test_slurm_commands_without_submitit(tmp_path: Path) -> None:
    """With the extra ``train`` alone, ``launch.train`` ends in a traceback, or ``launch.local`` asks for submitit."""
    done = run_bare(tmp_path, "-m", "launch.train", "--help", keep=TRAIN_EXTRA)
    assert done.returncode == 2
    assert done.stderr == "error: launch.train needs submitit: pip install 'sfw-dist[slurm]'\n"
    assert run_bare(tmp_path, "-m", "launch.local", "--help", keep=TRAIN_EXTRA).returncode == 0


@pytest.mark.parametrize(
    ("key", "value", "told", "remedy"),
    [
        ("engine", "deepspeed", "engine deepspeed needs deepspeed: ", "pip install 'sfw-dist[deepspeed]'"),
        ("data.backend", "ffcv", "data.backend ffcv: FFCV is not installed: ", "pip install 'sfw-dist[ffcv]'"),
    ],
)
def test_training_without_the_package_of_an_option(
    key: str, value: str, told: str, remedy: str, tmp_path: Path
) -> None:
    """``engine: deepspeed`` or ``data.backend: ffcv`` without that package ends in a traceback."""
    config = {"model": {"name": "cnn", "width": 0.1}, "train": {"epochs": 1}, "data": {"root": str(tmp_path / "data")}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    done = run_bare(tmp_path, "-m", "sfw_dist.train", "--config", "small.yaml", f"--{key}", value, keep=TRAIN_EXTRA)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {told}") and remedy in line
    assert "Traceback" not in done.stderr
