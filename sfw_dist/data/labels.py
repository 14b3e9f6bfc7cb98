"""From the labels of a data set of the user's own, integers or texts, to numbers of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sfw_dist.data.sampler import Ids
from sfw_dist.errors import UserError


class Numbered(NamedTuple):
    """The labels as numbers of classes."""

    train: Ids
    test: Ids
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What else people should know: one sentence each."""


def number_labels(train: Sequence[Any], test: Sequence[Any], classes: tuple[str, ...] | None) -> Numbered:
    """Number the classes.

    Args:
        train: an integer or a text for each training sample; likewise ``test``.
        classes: their names, by number, if anybody has said so; labels are then numbers or names. ``None``: the
            classes are the labels of training samples, sorted.

    Raises:
        UserError: integers and texts are mixed, or a label is no class.

    Example:
        >>> number_labels(["dog", "cat"], ["cat"], None)
        Numbered(train=array([1, 0]), test=array([0]), classes=('cat', 'dog'), notes=())
    """
    kinds = {isinstance(label, str) for label in (*train, *test)}
    if len(kinds) > 1:
        raise UserError("some labels are integers and some texts: give one kind")
    notes: tuple[str, ...] = ()
    if classes is None:
        values = sorted(set(train))
        classes = tuple(map(str, values))
        number = {value: i for i, value in enumerate(values)}
        if kinds == {False} and values != list(range(len(values))):
            notes = (f"the labels {values[0]} to {values[-1]} are numbered 0 to {len(values) - 1}",)
    else:
        if len(set(classes)) != len(classes):
            raise UserError(f"classes has {max(classes, key=classes.count)!r} more than once: give each another name")
        number = {(name if True in kinds else i): i for i, name in enumerate(classes)}
    return Numbered(_numbers("train", train, number), _numbers("test", test, number), classes, notes)


def _numbers(part: str, labels: Sequence[Any], number: dict[Any, int]) -> Ids:
    unknown = next((i for i, label in enumerate(labels) if label not in number), None)
    if unknown is not None:
        known = ", ".join(map(str, list(number)[:10])) + (", …" if len(number) > 10 else "")
        raise UserError(
            f"usable {part} sample {unknown} has the label {labels[unknown]!r}, which is no class of training samples "
            f"({known}): mend the label, or leave the sample out"
        )
    return np.array([number[label] for label in labels], np.int64)
