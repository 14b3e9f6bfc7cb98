"""From labels to numbers of classes."""

from __future__ import annotations

from typing import Any

import pytest

from sfw_dist.data.labels import number_labels
from sfw_dist.errors import UserError


@pytest.mark.parametrize(
    ("train", "test", "classes", "expected"),
    [
        (["b", "a", "b"], ["a"], None, ([1, 0, 1], [0], ("a", "b"))),
        ([0, 2, 1], [2], None, ([0, 2, 1], [2], ("0", "1", "2"))),
        ([10, 2, 10], [2], None, ([1, 0, 1], [0], ("2", "10"))),
        ([0, 1], [1], ("cat", "dog", "cow"), ([0, 1], [1], ("cat", "dog", "cow"))),
        (["dog"], ["cat"], ("cat", "dog"), ([1], [0], ("cat", "dog"))),
    ],
)
def test_classes_are_numbered(train: list[Any], test: list[Any], classes: Any, expected: Any) -> None:
    """Fails when labels from 1 on lose a class, numbers are sorted as text, or named classes are renumbered."""
    found = number_labels(train, test, classes)
    assert (found.train.tolist(), found.test.tolist(), found.classes) == expected
    assert bool(found.notes) == (train == [10, 2, 10])


@pytest.mark.parametrize(
    ("train", "test", "classes", "told"),
    [
        ([0, 1], [2], None, "test sample 0 has the label 2"),
        ([0, -1], [0], ("a", "b"), "train sample 1 has the label -1"),
        (["a"], ["b"], ("a",), "test sample 0 has the label 'b'"),
        (["a", 1], ["a"], None, "some labels are integers"),
        ([0], [0], ("a", "a"), "'a' more than once"),
    ],
)
def test_labels_of_no_class_are_refused(train: list[Any], test: list[Any], classes: Any, told: str) -> None:
    """Fails when an unlabelled test part (-1) is measured, or a class appears in the test part alone."""
    with pytest.raises(UserError, match=told):
        number_labels(train, test, classes)
