"""Compiles step.cpp once for this processor and keeps the library in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("cpu_step.cpp")
# No contraction: a product is rounded before it is added, as in torch's operations. Of 512-bit registers gcc would use
# half unless told.
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-w"]
_WIDE = "-mprefer-vector-width=512"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; ``None`` where they cannot be made, and the step then uses torch's operations.

    ``SFW_DIST_CACHE`` names another folder than ``~/.cache/sfw_dist``, and ``CXX`` another compiler.
    """
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip()[:500]
        logger.warning("the optimizer's step will be slower, for its kernels could not be compiled: %s", said)
        return None


def _compiled() -> Path:
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), "c++", "g++", "clang++"])), None)
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler: install g++, or name one in CXX")
    flags = [*_FLAGS, _WIDE] if "avx512" in _processor() else _FLAGS
    identity = "\0".join([_SOURCE.read_text(), *flags, compiler, _processor()])
    folder = _cache()
    target = folder / f"step-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        # Ranks that start together may each compile; the last of the equal files stays.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, target.name)
            command = [compiler, *flags, "-shared", "-fPIC", str(_SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(made, target)
    return target


def _cache() -> Path:
    """A folder that no one else can write to: what is in it gets loaded."""
    folder = Path(os.environ.get("SFW_DIST_CACHE", "~/.cache/sfw_dist")).expanduser()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} can be written by others: chmod 700 it, or name another in SFW_DIST_CACHE")
    return folder


def _processor() -> str:
    """What the compiler may use, for homes that unlike machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
