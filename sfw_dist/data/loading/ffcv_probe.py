"""Whether FFCV works on this machine, tried in a process of its own: where it fails, it may hang or crash."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sfw_dist.data.loading.augment import Augmentation, transform
from sfw_dist.files import file_lock, write_json

TIME_LIMIT = 120.0
"""Seconds until a probe that does not end counts as failed; it takes about five."""
_JPEG_TOLERANCE = 16
"""FFCV's decoder rounds more coarsely than Pillow's, usually by 1."""
_REMEDY = "apt-get install pkg-config libopencv-dev libturbojpeg0-dev, then pip install 'sfw-dist[ffcv]'"


def ffcv_installed() -> bool:
    """Whether there is a package FFCV, working or not."""
    return find_spec("ffcv") is not None


@cache
def ffcv_problem(folder: Path) -> str | None:
    """Why FFCV cannot be used on this machine, if so.

    Args:
        folder: where the answer is kept, for each machine, until a package that it depends on changes.

    Returns:
        The problem and the remedy in one line, or ``None`` when FFCV works.
    """
    if not ffcv_installed():
        return f"FFCV is not installed: {_REMEDY}"
    known, key = folder / f".ffcv_{platform.node() or 'here'}.json", _versions()
    try:
        with file_lock(known.with_name(f"{known.name}.lock")):
            answer = _read(known)
            if answer is None or answer["versions"] != key:
                answer = {"versions": key, "problem": _probe()}
                write_json(known, answer)
    except OSError:  # the folder cannot be written
        return _probe()
    problem: str | None = answer["problem"]
    return problem


def _read(known: Path) -> dict[str, str | None] | None:
    try:
        answer = json.loads(known.read_bytes())
        return answer if isinstance(answer, dict) and answer.keys() == {"versions", "problem"} else None
    except (OSError, ValueError):
        return None


def _versions() -> str:
    packages = []
    for name in ("ffcv", "numba", "numpy", "torch"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"no {name}")
    return ", ".join([f"Python {platform.python_version()} {platform.machine()}", *packages])


def _probe() -> str | None:
    # Without the variables of a rank or of a job's task, so that nothing in the process takes itself for one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_", "RANK", "WORLD_SIZE"))}
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from sfw_dist.data.loading.ffcv_probe import try_ffcv; try_ffcv()"],
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return f"its probe did not end within {TIME_LIMIT:g} s: {_REMEDY}"
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return f"its probe failed ({last}): {_REMEDY}"


def try_ffcv() -> None:
    """Write a small beton, read it with every kind of augmentation, and decode a JPEG; compare with the references.

    Raises:
        RuntimeError: FFCV has read something else.
    """
    from sfw_dist.data.loading.ffcv import FFCVBackend, decode_jpeg, write_beton

    jpeg = io.BytesIO()
    ramp = np.linspace(0, 255, 16 * 24 * 3).reshape(16, 24, 3).astype(np.uint8)
    Image.fromarray(ramp).save(jpeg, "JPEG", quality=95)
    decoded = decode_jpeg(jpeg.getvalue(), 16, 24)
    if decoded is None or np.abs(decoded.astype(int) - np.asarray(Image.open(jpeg))).max() > _JPEG_TOLERANCE:
        raise RuntimeError("FFCV decodes another JPEG than was written")
    images = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
    ids = np.arange(7)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.beton"
        with path.open("wb") as file:
            write_beton(file, images, ids)
        backend = FFCVBackend(path, ids, (3, 6, 5))
        for augmentation in (Augmentation(), Augmentation(2, True, 2), Augmentation(random_resized_crop=0.1)):
            params = augmentation.sample_params(ids, (6, 5), seed=0, epoch=0)
            expected = transform(torch.from_numpy(images), ids, params)
            if not torch.equal(backend.fetch(ids, params)[0], expected):
                raise RuntimeError("FFCV read other pixels than were written")
