"""An environment with torch and numpy alone, made from the one that the tests run in.

A ``sitecustomize`` module, which every Python process imports before anything else, hides all other packages.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
OURS = {"sfw_dist", "launch"}

_HIDES = """
import sys
from importlib.machinery import PathFinder

HIDDEN = frozenset({hidden!r})


class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in HIDDEN:
            return super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


def with_dependencies(*distributions: str) -> set[str]:
    """Distributions and all that they require in this environment, as canonical names; without extras."""
    found: set[str] = set()
    unseen = [canonicalize_name(name) for name in distributions]
    while unseen:
        name = unseen.pop()
        if name in found:
            continue
        try:
            requirements = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:  # a requirement of another platform
            continue
        found.add(name)
        for requirement in requirements:
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                unseen.append(canonicalize_name(requirement.name))
    return found


def hidden_packages(*distributions: str) -> list[str]:
    """The top-level packages of this environment that none of ``distributions`` and their dependencies provides."""
    kept = with_dependencies(*distributions)
    return sorted(
        package
        for package, providers in packages_distributions().items()
        if package not in OURS and not kept & {canonicalize_name(provider) for provider in providers}
    )


def run_bare(folder: Path, *arguments: str, keep: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python where only torch, numpy and what they require can be imported.

    Args:
        folder: an empty folder, in which the process runs.
        arguments: of Python.
        keep: further distributions that stay importable, with their dependencies.
    """
    hooks = folder / ".hooks"
    hooks.mkdir(exist_ok=True)
    hidden = hidden_packages("torch", "numpy", *keep)
    (hooks / "sitecustomize.py").write_text(_HIDES.format(hidden=hidden))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {
        "PYTHONPATH": f"{hooks}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
