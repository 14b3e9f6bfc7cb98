"""The commands in README and in the manual exist, and take the options that are written there.

Each command is parsed by its own parser and stops there: nothing is trained or submitted.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from launch import cli
from tests.docs.pages import PAGES, ROOT, block_commands, inline_commands, page_id

OURS = ("sfw_dist", "launch", "experiments", "benchmarks")
OTHER_MODULES = {"build", "mkdocs", "pytest", "venv", "tensorboard.main"}
SHELL = {"export", "cd", ".", "mkdir", "sinfo", "squeue"}
ASSIGNMENT = re.compile(r"[A-Z_]+=")
A_CONFIG = "configs/digits/sfw.yaml"


class ParsedError(BaseException):
    """Raised in place of what a command does once its arguments are accepted."""


def check(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a command could not be started as it is written."""
    while ASSIGNMENT.match(words[0]) or words[0] == "sudo":
        words = words[1:]
    program, arguments = words[0], list(words[1:])
    match program:
        case "python":
            check_python(arguments, monkeypatch)
        case "torchrun":
            check_torchrun(arguments, monkeypatch)
        case "deepspeed":
            at = arguments.index("--module")
            check_module(arguments[at + 1], arguments[at + 2 :], monkeypatch)
        case "sfw-dist":
            check_module(cli._VERBS[arguments[0]][0], arguments[1:], monkeypatch)
        case "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            unknown = [word for word in arguments if word not in targets and not ASSIGNMENT.match(word)]
            assert not unknown, f"the Makefile has no target {unknown}"
        case "pip":
            check_pip(arguments)
        case "sbatch":
            script = next(word for word in arguments if word.endswith(".sbatch"))
            assert (ROOT / script).exists(), f"{script} does not exist"
        case _ if program.startswith("slurm/"):
            check_script(program, arguments, also="slurm/local_cluster/cluster.py")
        case _:
            assert program in SHELL, f"{program} is no command that this test knows"


def check_python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[0] != "-m":
        check_script(arguments[0], arguments[1:])
    elif arguments[1].split(".")[0] in OURS:
        check_module(arguments[1], arguments[2:], monkeypatch)
    else:
        assert arguments[1] in OTHER_MODULES, f"{arguments[1]} is no module that this test knows"


def check_torchrun(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = get_args_parser().parse_args(arguments)
    if options.module:
        check_module(options.training_script, options.training_script_args, monkeypatch)
    else:
        check_script(options.training_script, options.training_script_args)


def check_script(path: str, arguments: Sequence[str], also: str | None = None) -> None:
    """A script is there, or is written by a block of a page, and its source names the options."""
    titled = any(f'title="{path}"' in page.read_text() for page in PAGES)
    assert titled or (ROOT / path).exists(), f"{path} does not exist"
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    source = "".join((ROOT / each).read_text() for each in (path, also) if each is not None and not titled)
    assert all(f'"{option}"' in source for option in options), f"{path} does not take all of {options}"


def check_pip(arguments: Sequence[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
        unknown = set(extras.split(",")) - set(project["optional-dependencies"])
        assert not unknown, f"pyproject.toml has no extras {unknown}"


def check_module(name: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of ours is a command, and its parser accepts the arguments."""
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    run_configs = [A_CONFIG if re.fullmatch(r"runs/\S+\.yaml", word) else word for word in arguments]
    with monkeypatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [name, *run_configs])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
        if parses_a_run(module):
            patch.setattr(module, "parse_run", stop_after(module.parse_run))
        with pytest.raises((ParsedError, SystemExit)) as stopped:
            module.main()
        assert "--help" in arguments or stopped.type is ParsedError, f"{name} refuses {' '.join(arguments)}"


def parses_a_run(module: ModuleType) -> bool:
    """Whether the command reads a configuration, with a parser that calls argparse's several times."""
    return hasattr(module, "parse_run")


def stop_after(parse: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which then raises :class:`ParsedError`."""

    def parse_and_stop(*args: Any, **kwargs: Any) -> Any:
        parse(*args, **kwargs)
        raise ParsedError

    return parse_and_stop


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_are_accepted(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A reader copies a command whose module, configuration or option does not exist."""
    for words in (*block_commands(page), *inline_commands(page)):
        try:
            check(words, monkeypatch)
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            pytest.fail(f"{page_id(page)}: {' '.join(words)}: {error}\n{capsys.readouterr().err}")


@pytest.mark.parametrize(
    "command",
    [
        "python -m sfw_dist.nothing",
        "python -m sfw_dist.evaluate runs/x --sparsity 0.5",
        "python -m sfw_dist.train --config configs/nothing.yaml",
        "torchrun --nproc-per-node 2 -m sfw_dist.train --name x --optimizer.rate 1",
        "python -m launch.local --name x --nproc 2 --optimizer.rate 1",
        "sfw-dist evaluate",
        "sfw-dist paint",
        "make nothing",
        "pip install '.[nothing]'",
        "python examples/nothing.py",
        "slurm/local_cluster/up --hosts 2",
        "paint runs/x",
    ],
)
def test_bad_commands_are_found(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check lets a mistake pass."""
    with pytest.raises((Exception, SystemExit, pytest.fail.Exception)):
        check(shlex.split(command), monkeypatch)
