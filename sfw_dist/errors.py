"""Errors that a user can mend, how commands report them, and how a missing optional dependency becomes one of them."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

_DISTRIBUTIONS = {"PIL": "Pillow", "sklearn": "scikit-learn", "yaml": "PyYAML"}
"""What pip calls a package, where that is not the name it is imported by."""
_OURS = ("sfw_dist", "launch")
MOST_NAMED = 10
"""Items of a list that a message names; further ones are counted."""
_importing: list[str] = []
"""The command whose modules are being imported, if any."""


class UserError(ValueError):
    """Bad input that a user can mend.

    The message is one line: the offending value, then the remedy. Every rank raises it, and rank 0 alone prints it.
    """


class RankError(UserError):
    """An error that one rank alone has met, so that it prints the message itself."""


class MissingExtraError(UserError, ImportError):
    """A part of sfw_dist needs a package that is not installed, or cannot be imported."""


@contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Surround the imports of optional dependencies, so that a missing one is an error that names the extra.

    Args:
        what: the part that needs the imports, for the message.
        extra: the extra of pyproject.toml that installs them.

    Raises:
        MissingExtraError: an import failed. An ``ImportError`` about a module of sfw_dist itself is not translated.

    Example:
        >>> with needs_extra("data set digits", "train"):
        ...     import package_that_is_not_installed
        Traceback (most recent call last):
        ...
        sfw_dist.errors.MissingExtraError: data set digits needs package_that_is_not_installed: pip install \
'sfw-dist[train]'
    """
    try:
        yield
    except MissingExtraError:
        raise
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package in _OURS:
            raise
        missing = isinstance(error, ModuleNotFoundError) and package
        reason = f"needs {_DISTRIBUTIONS.get(package, package)}" if missing else f"cannot be imported ({error})"
        raise MissingExtraError(f"{what} {reason}: pip install 'sfw-dist[{extra}]'") from None


def named(items: Sequence[str]) -> str:
    """The first items of a list, and how many more there are.

    Example:
        >>> named([str(i) for i in range(12)])
        '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more'
    """
    more = f" and {len(items) - MOST_NAMED} more" if len(items) > MOST_NAMED else ""
    return ", ".join(items[:MOST_NAMED]) + more


def import_path(path: str, key: str, remedy: str) -> object:
    """What a user names as ``package.module:name``.

    Args:
        path: the import path.
        key: where it was given, for the message.
        remedy: what to write instead.

    Raises:
        UserError: it cannot be imported.

    Example:
        >>> import_path("math:pi", "model.name", "write package.module:function")
        3.141592653589793
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}: cannot import {path} ({error}): {remedy}") from None


@contextmanager
def command_imports(command: str, extra: str) -> Iterator[None]:
    """Surround the imports of a command's module: without ``extra`` the command ends in one line and exit status 2.

    The module cannot be imported then, so that its ``main``, which reports all other errors, never runs. A command
    that imports another one reports what is missing under its own name.

    Args:
        command: the module's name, as on the command line.
        extra: the extra of pyproject.toml that installs what the command imports.

    Raises:
        SystemExit: status 2, after the line was printed: an import failed.
    """
    if _importing:
        yield
        return
    _importing.append(command)
    try:
        with needs_extra(command, extra):
            yield
    except MissingExtraError as error:
        _print_once(str(error))
        raise SystemExit(2) from None
    finally:
        _importing.clear()


def reports_user_errors(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's ``main`` so that a :class:`UserError` ends in one line on stderr and exit status 2.

    So does an ``OSError`` that names a file. Ctrl-C ends with exit status 130.

    Args:
        main: returns the exit status; ``None`` stands for 0.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs) or 0
        except RankError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except UserError as error:
            _print_once(str(error))
            return 2
        except OSError as error:  # a folder that cannot be written, a full disk: the error names the file
            if error.filename is None:
                raise
            _print_once(f"{error.filename}: {error.strerror}: choose another place, or mend this one")
            return 2
        except KeyboardInterrupt:  # before or after the part that saves on ctrl-C
            return 130

    return wrapped


def _print_once(message: str) -> None:
    """Print an error that every rank has met, on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
