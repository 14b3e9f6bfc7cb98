"""The wheel and the source distribution hold what they must, and the wheel's library works when unpacked elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import sfw_dist

ROOT = Path(__file__).parents[2]

STEP = """
import torch, sfw_dist
from sfw_dist import SFW, KSparsePolytope, constrain
from sfw_dist.optim.kernels import cpu
assert sfw_dist.__file__.startswith({folder!r}), sfw_dist.__file__
assert cpu.available()
net = torch.nn.Linear(8, 8)
before = net.weight.detach().clone()
optimizer = SFW(constrain(net, KSparsePolytope(k_frac=0.1, k_min=2, tau=5.0)), lr=0.5)
net(torch.ones(4, 8)).square().sum().backward()
optimizer.step()
assert not torch.equal(net.weight, before)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and source distribution, built from a copy: setuptools leaves files in the tree it builds."""
    folder = tmp_path_factory.mktemp("built")
    kept = {"sfw_dist", "launch", "tests", "configs", "slurm", "docs", "examples", "experiments", "benchmarks"}
    made = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for path in ROOT.iterdir():
        if path.is_file():
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(path, folder / "source")
        elif path.name in kept:
            shutil.copytree(path, folder / "source" / path.name, ignore=made)
    script = (
        "import os, sys; _, source, target = sys.argv; os.chdir(source); from setuptools import build_meta as backend; "
        "backend.build_wheel(target); backend.build_sdist(target)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder / "source"), str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    assert path.name == f"sfw_dist-{sfw_dist.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_packages_and_their_data(wheel: zipfile.ZipFile) -> None:
    """The C++ source, the mark of types or a package is left out; or tests and benchmarks are installed too."""
    names = set(wheel.namelist())
    assert {"sfw_dist/py.typed", "sfw_dist/optim/kernels/cpu_step.cpp", "launch/cli.py"} <= names
    modules = {
        str(path.relative_to(ROOT)) for package in ("sfw_dist", "launch") for path in (ROOT / package).rglob("*.py")
    }
    assert modules <= names
    assert {name.partition("/")[0] for name in names} == {
        "sfw_dist",
        "launch",
        f"sfw_dist-{sfw_dist.__version__}.dist-info",
    }


def test_the_wheel_requires_torch_and_numpy_alone(wheel: zipfile.ZipFile) -> None:
    """``pip install sfw-dist`` installs more than the library needs, or an extra is lost."""
    metadata = message_from_string(wheel.read(f"sfw_dist-{sfw_dist.__version__}.dist-info/METADATA").decode())
    required = metadata.get_all("Requires-Dist") or []
    assert sorted(line.split(">")[0] for line in required if "extra ==" not in line) == ["numpy", "torch"]
    assert metadata["Version"] == sfw_dist.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {"train", "ffcv", "deepspeed", "slurm", "deploy", "examples", "all", "docs", "dev"}
    assert set(metadata.get_all("Provides-Extra") or []) == set(project["optional-dependencies"]) == extras


def test_the_wheel_works_elsewhere(built: Path, wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """The compiled step finds its source in a checkout only."""
    site = tmp_path / "site"
    wheel.extractall(site)
    environment = os.environ | {"PYTHONPATH": str(site), "SFW_DIST_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", STEP.format(folder=str(site))],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "cache").glob("*.so")), "the kernel was not compiled from the wheel's source"


def test_the_source_distribution_can_be_built_and_tested(built: Path) -> None:
    """A wheel built from it lacks the C++ source, or its tests lack what they read; or it carries results."""
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        *("pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "README.md", "CHANGELOG.md"),
        *("sfw_dist/py.typed", "sfw_dist/optim/kernels/cpu_step.cpp", "launch/cli.py"),
        *("tests/conftest.py", "tests/golden/trajectory.npz", "configs/cluster/example.yaml", "examples/digits.py"),
    } <= names
    assert not any(name.startswith(("results/", ".ci/")) for name in names)
