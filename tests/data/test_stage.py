"""Staging to a disk of the node."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from sfw_dist.config import DataConfig
from sfw_dist.data.loading import open_loader
from sfw_dist.errors import UserError
from tests.support.downloads import one_line
from tests.support.loaders import (
    BACKENDS,
    BackendName,
    epoch_of,
    same,
    truncate,
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_staging_reads_from_the_copy(
    config: DataConfig, backend: BackendName, damaged_root: Path, tmp_path: Path
) -> None:
    """The copy is not used, so that every epoch reads from the network; or it has other pixels."""
    config = replace(config, backend=backend, root=str(damaged_root), stage_dir=str(tmp_path / "disk"))
    expected = epoch_of(open_loader(replace(config, stage_dir=None), "train", seed=0))
    open_loader(config, "train", seed=0).close()
    (copy,) = (tmp_path / "disk").iterdir()
    data_file = "train.beton" if backend == "ffcv" else "train_images.npy"
    original = damaged_root / "digits" / data_file
    original.write_bytes(bytes(original.stat().st_size))  # what is read from here is zeros
    os.utime(copy / data_file, (0, 0))
    assert same(epoch_of(open_loader(config, "train", seed=0)), expected)
    assert (copy / data_file).stat().st_mtime == 0  # not copied again
    truncate(copy / data_file)
    with pytest.raises(UserError, match=f"{original} is damaged"):
        open_loader(config, "train", seed=0)


def test_staging_where_nothing_can_be_written_is_told(config: DataConfig) -> None:
    """A traceback when the node's disk is full or not there."""
    with pytest.raises(
        UserError, match=r"data.stage_dir /dev/null/disk: cannot copy.*: choose another folder, or leave it out"
    ) as error:
        open_loader(replace(config, stage_dir="/dev/null/disk"), "train", seed=0)
    one_line(error)
