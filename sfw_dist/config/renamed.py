"""Old names in configurations and on the command line: files and run folders of earlier versions keep working."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sfw_dist.errors import UserError
from sfw_dist.pruning.options import without_old_words

KEYS = {"gradual": "gmp", "gradual.kind": "ranking"}
"""The new last part of a key, by the key's old dotted name."""
VALUES = {("method", "gradual"): "gmp", ("data.backend", "torch"): "ram"}
"""The new value, by dotted key and old value."""
REMOVED = {"optimizer.overlap"}
"""Old dotted names of fields that are gone and never changed a result; they are ignored in files."""


def translate_tree(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the mapping of a configuration file with old keys and values replaced, and removed keys left out.

    Args:
        tree: the file's mapping; not changed.
        prefix: dotted name of ``tree`` itself with a dot at its end, empty for a whole file.

    Raises:
        UserError: an unknown ``prune.kind``, or an old word next to the one that replaces it.

    Example:
        >>> translate_tree({"method": "gradual", "gradual": {"kind": "layerwise"}})
        {'method': 'gmp', 'gmp': {'ranking': 'layerwise'}}
    """
    translated = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if dotted in REMOVED:
            continue
        if isinstance(value, dict):
            value = translate_tree(value, f"{dotted}.")
            if dotted == "prune":
                value = _without_prune_kind(value)
        new = KEYS.get(dotted, key)
        if new != key and new in tree:
            raise UserError(f"{prefix}{key} is an older word for {prefix}{new}, and both are given: leave {key} out")
        translated[new] = _new_value(dotted, value)
    return translated


def translate_arguments(argv: Sequence[str]) -> list[str]:
    """Return command-line arguments with old options and values replaced by their new names.

    Raises:
        UserError: an unknown ``--prune.kind``.

    Example:
        >>> translate_arguments(["--method", "gradual", "--gradual.kind=layerwise"])
        ['--method', 'gmp', '--gmp.ranking=layerwise']
        >>> translate_arguments(["--prune.kind", "layerwise"])
        ['--prune.granularity=weight', '--prune.ranking=layerwise']
    """
    return list(_kinds_translated(_translated(argv)))


def _translated(argv: Sequence[str]) -> Iterator[str]:
    option = ""
    for argument in argv:
        if not argument.startswith("--"):
            yield _new_value(option, argument)
            continue
        option, equals, value = argument.removeprefix("--").partition("=")
        parts = option.split(".")
        new = ".".join(KEYS.get(".".join(parts[: end + 1]), part) for end, part in enumerate(parts))
        yield f"--{new}{equals}{_new_value(option, value)}"


def _kinds_translated(arguments: Iterator[str]) -> Iterator[str]:
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option != "--prune.kind":
            yield argument
            continue
        kind = value if equals else next(arguments, "")
        yield from (f"--prune.{key}={word}" for key, word in _without_prune_kind({"kind": kind}).items())


def _without_prune_kind(section: dict[str, Any]) -> dict[str, Any]:
    try:
        return without_old_words(section)
    except UserError as error:
        raise UserError(f"prune: {error}") from None


def _new_value(dotted: str, value: Any) -> Any:
    return VALUES.get((dotted, value), value) if isinstance(value, str) else value
