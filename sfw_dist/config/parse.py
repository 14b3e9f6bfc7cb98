"""From YAML files that inherit, and dotted overrides on the command line, to a checked configuration, and back."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from sfw_dist.config.schema import Config
from sfw_dist.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in ``path`` laid over that of its ``base:``, and so on; to inherit in a circle is an error."""
    return _read_yaml(path, seen=())


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path} inherits from itself through base: {' -> '.join(map(str, seen))}: remove one base")
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the configuration {path} ({error.strerror}): see configs/ for examples") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML ({' '.join(str(error).split())}): correct that place") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}: write 'key: value' lines")
    base = tree.pop("base", None)
    if base is None:
        return tree
    below = _read_yaml(path.parent / str(base), (*seen, path.resolve()))
    below.pop("name", None)  # two runs of one name would share a folder
    return _overlay(below, tree)


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def check_keys(tree: dict[str, Any], schema: type, where: str, prefix: str = "") -> None:
    """Name the first key of ``tree`` that is empty, or that ``schema`` does not have, with its nearest neighbour."""
    types = get_type_hints(schema)
    known = [f.name for f in fields(schema)]
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"
            raise UserError(f"{where}: unknown key {dotted}: {remedy}")
        if is_dataclass(types[key]):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {dotted} is a section, got {value!r}: write 'key: value' lines below it")
            check_keys(value, types[key], where, f"{dotted}.")
        elif value is None and type(None) not in get_args(types[key]):
            raise UserError(f"{where}: {dotted} is empty (null): write a value, or remove the line for the default")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with types and defaults that leaves the lines of the examples as written."""


def parse_run(
    argv: Sequence[str] | None,
    *,
    description: str,
    examples: str,
    add_options: Callable[[ArgumentParser], None] = lambda parser: None,
) -> tuple[Config, Namespace]:
    """Read ``--config FILE`` and the dotted overrides after it.

    ``add_options`` adds the options of one command. Returns the configuration and the namespace with those options.
    """
    parser = ArgumentParser(
        prog="python -m sfw_dist.train",
        exit_on_error=False,
        allow_abbrev=False,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=_Formatter,
    )
    parser.add_argument("--config", type=str, help="YAML file of the run; see configs/.")
    add_options(parser)
    parser.add_class_arguments(Config, skip={"name"})
    parser.add_argument("--name", type=str, help="The run's name; the file's name when neither gives one.")

    # `--config` is taken first, so that what stands on the command line lies over the file whatever the order.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config")
    config_file: str | None = None
    try:
        config_file = first.parse_known_args(argv)[0].config
        below = None
        if config_file is not None:
            path = Path(config_file)
            tree = {"name": path.stem} | read_yaml(path)
            check_keys(tree, Config, str(path))
            below = parser.parse_object(tree, defaults=True)
        options = parser.parse_args(argv, namespace=below)
        if options.name is None:
            raise UserError("a run needs a name: give --config FILE or --name NAME")
        config = instantiate(options, parser)
    except (ArgumentError, TypeError) as error:
        where = f" ({config_file})" if config_file else ""
        raise UserError(f"{_one_line(error)}{where}: see --help") from None
    return config, options


def instantiate(options: Namespace, parser: ArgumentParser) -> Config:
    """The dataclasses from parsed values; their ``__post_init__`` raises :class:`UserError`."""
    values = parser.instantiate(options)
    return Config(**{f.name: values[f.name] for f in fields(Config)})


def save_config(config: Config) -> str:
    """The resolved configuration as YAML text; :func:`load_config` reads it back to an equal object."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def load_config(path: Path) -> Config:
    """The configuration in one YAML file (with its bases), without command line."""
    return parse_run(["--config", str(path)], description="", examples="")[0]
