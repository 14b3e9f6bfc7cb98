"""From YAML files that inherit, and dotted overrides on the command line, to a checked configuration, and back."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from sfw_dist.config.constraint import ConstraintConfig, check_given_fields
from sfw_dist.config.renamed import translate_arguments, translate_tree
from sfw_dist.config.schema import Config
from sfw_dist.errors import UserError
from sfw_dist.files import user_path

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file and the files that it inherits from through ``base:``.

    Args:
        path: the file. ``base`` is relative to the file that names it. A base's ``name`` is not inherited: two runs of
            one name would share a folder.

    Returns:
        The file's mapping laid over that of its base, section by section; old names are translated.

    Raises:
        UserError: a file cannot be read, is no mapping, or inherits from itself.
    """
    return _merge(_read_layers(path, seen=()))


def _read_layers(path: Path, seen: tuple[Path, ...]) -> list[tuple[Path, dict[str, Any]]]:
    """The mappings of a file and its bases, each with its path; the root base first."""
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
    try:
        tree = translate_tree(tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    base = tree.pop("base", None)
    if base is None:
        return [(path, tree)]
    below = _read_layers(path.parent / user_path(str(base)), (*seen, path.resolve()))
    for _, inherited in below:
        inherited.pop("name", None)
    return [*below, (path, tree)]


def _merge(layers: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for _, tree in layers:
        merged = _overlay(merged, tree)
    return merged


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def check_keys(tree: dict[str, Any], schema: type, where: str, prefix: str = "") -> None:
    """Refuse a mapping with a key that a configuration class does not have, or with an empty value.

    Args:
        tree: the mapping of a file.
        schema: the dataclass that it configures.
        where: the file, for messages.
        prefix: dotted name of ``tree`` with a dot at its end, empty for a whole file.

    Raises:
        UserError: naming the first such key, and the known key that is most like it.
    """
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


def _check_constraint_fields(layers: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Refuse a field that a file gives although the set in force there does not take it."""
    chosen = ConstraintConfig().set
    for path, tree in layers:
        given = tree.get("optimizer", {}).get("constraint", {})
        chosen = given.get("set", chosen)
        check_given_fields(given, chosen, str(path))


def _check_constraint_options(argv: Sequence[str], chosen: str) -> None:
    """The same for the command line."""
    prefix = "--optimizer.constraint."
    given = {}
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if argument.startswith(prefix):
            key, equals, value = argument.removeprefix(prefix).partition("=")
            text = value if equals else following
            given[key] = None if text == "null" else text
    check_given_fields(given, chosen, "command line")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with types and defaults that keeps the line breaks of the examples."""


def add_resume_option(parser: ArgumentParser) -> None:
    """Add ``--resume auto|never``, which every command that trains takes in addition to the configuration."""
    resume_help = "auto: resume from the run's newest checkpoint, if it has one; never: the run must be new."
    parser.add_argument("--resume", choices=["auto", "never"], default="never", help=resume_help)


def parse_run(
    argv: Sequence[str] | None,
    *,
    description: str = "",
    examples: str = "",
    add_options: Callable[[ArgumentParser], None] = lambda parser: None,
) -> tuple[Config, Namespace]:
    """Read ``--config FILE`` and the dotted overrides of the command line.

    Args:
        argv: the arguments; ``None`` for those of this process.
        description: of the command, for ``--help``.
        examples: command lines, for ``--help``.
        add_options: adds the options that one command has in addition.

    Returns:
        The configuration, and the namespace with the added options and ``config``, the file's path or ``None``.

    Raises:
        UserError: an unknown option or key, or a value outside its domain.

    Example:
        >>> config, _ = parse_run(["--name", "a", "--optimizer.lr", "0.5"])
        >>> config.name, config.optimizer.lr
        ('a', 0.5)
    """
    arguments = translate_arguments(sys.argv[1:] if argv is None else argv)
    parser = _run_parser(description, examples, add_options)
    config_file: str | None = None
    try:
        config_file = _config_option(arguments)
        below = None
        if config_file is not None:
            path = user_path(config_file)
            layers = _read_layers(path, seen=())
            for layer, tree in layers:
                check_keys(tree, Config, str(layer))
            _check_constraint_fields(layers)
            below = parser.parse_object({"name": path.stem} | _merge(layers), defaults=True)
        options = parser.parse_args(arguments, namespace=below)
        if options.name is None:
            raise UserError("a run needs a name: give --config FILE or --name NAME")
        _check_constraint_options(arguments, options.optimizer.constraint.set)
        config = _instantiate(options, parser)
    except (ArgumentError, TypeError) as error:
        where = f" ({config_file})" if config_file else ""
        raise UserError(f"{_one_line(error)}{where}: see --help") from None
    return config, options


def _run_parser(description: str, examples: str, add_options: Callable[[ArgumentParser], None]) -> ArgumentParser:
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
    return parser


def _config_option(arguments: Sequence[str]) -> str | None:
    """The value of ``--config``, read before all other options: they override the file wherever they stand."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    config_file: str | None = parser.parse_known_args(arguments)[0].config
    return config_file


def _instantiate(options: Namespace, parser: ArgumentParser) -> Config:
    """The dataclasses from parsed values; their ``__post_init__`` raises :class:`UserError`."""
    values = parser.instantiate(options)
    return Config(**{f.name: values[f.name] for f in fields(Config)})


def save_config(config: Config) -> str:
    """Return the configuration as YAML text with every field; :func:`load_config` reads it back as an equal object."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def load_config(path: Path) -> Config:
    """Read the configuration in one YAML file and its bases, without a command line.

    Raises:
        UserError: the file cannot be read, has an unknown key, or a value outside its domain.
    """
    return parse_run(["--config", str(path)])[0]
