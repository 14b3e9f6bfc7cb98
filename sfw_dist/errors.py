"""Errors that a user can mend, and how the commands report them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input. The message is one line: the offending value, then the remedy. Every rank meets it."""


class RankError(UserError):
    """What one rank met alone, so that it must say so itself."""


def reports_user_errors(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's ``main`` so that a :class:`UserError` ends in one line on stderr and exit status 2.

    Of what every rank meets, rank 0 alone prints it.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            if isinstance(error, RankError) or os.environ.get("RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr)
            return 2
        except OSError as error:  # a folder that cannot be written, a full disk: the file says where
            if error.filename is None:
                raise
            if os.environ.get("RANK", "0") == "0":
                print(
                    f"error: {error.filename}: {error.strerror}: choose another place, or mend this one",
                    file=sys.stderr,
                )
            return 2
        except KeyboardInterrupt:  # before or after the part that saves on ctrl-C
            return 130

    return wrapped
