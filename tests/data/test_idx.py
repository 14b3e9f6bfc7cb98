"""IDX files that are damaged, or hold something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sfw_dist.data.datasets import array_sets
from sfw_dist.data.prepare import prepare
from sfw_dist.errors import UserError
from tests.support.downloads import one_line
from tests.support.raw_data import idx_bytes


def _truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train-images-idx3-ubyte.gz", _truncate),
        ("train-images-idx3-ubyte.gz", lambda content: b"<html>not found</html>"),
        ("train-labels-idx1-ubyte.gz", lambda content: content[:30] + b"\xff\xff" + content[32:]),
        ("t10k-images-idx3-ubyte", _truncate),
        ("t10k-images-idx3-ubyte", lambda content: content[:6]),
        ("t10k-images-idx3-ubyte", lambda content: b""),
        ("t10k-images-idx3-ubyte", lambda content: content + b"\0"),
        ("t10k-images-idx3-ubyte", lambda content: b"\0\0\x0d\x03" + content[4:]),
        ("t10k-labels-idx1-ubyte", lambda content: idx_bytes(np.arange(9))),
        ("t10k-labels-idx1-ubyte", lambda content: idx_bytes(np.arange(10) + 1)),
        ("t10k-images-idx3-ubyte", lambda content: idx_bytes(np.zeros((10, 8, 8)))),
    ],
)
def test_a_damaged_raw_file_is_named(
    fashion_root: Path, monkeypatch: pytest.MonkeyPatch, file: str, damage: Callable[[bytes], bytes]
) -> None:
    """Fails when a truncated file ends in a traceback of zlib or numpy, or trains on garbage."""
    monkeypatch.setattr(array_sets, "matches", lambda *_: True)
    path = fashion_root / "raw" / "fashion_mnist" / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as error:
        prepare("fashion_mnist", fashion_root)
    assert file in one_line(error)
    assert not (fashion_root / "fashion_mnist").exists()
