"""The import rule, checked on the source without running it.

``sfw_dist`` is made of units: the modules and packages directly below it. ``LAYERS`` lists them from the bottom up, the
library before the application. A
unit imports only from its own layer or an earlier one, and no modules import each other in a circle. So the mathematics
can be read, tested and used without configuration, data or training, and whoever changes a layer knows that only the
later ones can break. Apart from the layers stands ``report``, which reads the files of a run and may be copied out.

Third parties are kept where they can be missing: FFCV in ``data/loading/ffcv.py``, DeepSpeed in
``optim/deepspeed.py``, Triton in ``optim/kernels``, and submitit in ``launch``, which ``sfw_dist`` does not know.
"""

from __future__ import annotations

import ast
import graphlib
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LIBRARY = (
    {"errors"},
    {"distributed"},
    {"ops"},
    {"constraints", "pruning"},
    {"optim"},
)
APPLICATION = (
    {"__init__", "files", "models", "config"},
    {"data"},
    {"train"},
    {"evaluate"},
)
LAYERS = (*LIBRARY, *APPLICATION)
APART = {"report": {"errors", "files"}}
MOST_LINES = 400


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: str, root: Path = ROOT) -> dict[str, Path]:
    """All modules of a package by dotted name."""
    return {module_name(path, root): path for path in sorted((root / package).rglob("*.py"))}


def imports(module: str, path: Path, known: set[str]) -> set[str]:
    """The dotted names that ``module`` imports, in functions and for type checking too.

    ``from package import name`` is an import of ``package.name`` if that is one of the ``known`` modules.
    """
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package) if node.level else str(node.module)
            submodules = {f"{source}.{alias.name}" for alias in node.names} & known
            found |= submodules
            if len(submodules) < len(node.names):
                found.add(source)
    return found


SOURCES = modules("sfw_dist")
IMPORTS = {module: imports(module, path, set(SOURCES)) for module, path in SOURCES.items()}


def unit(module: str) -> str:
    """``sfw_dist.data.sampler`` is part of ``data``; ``sfw_dist`` itself is ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def users(name: str) -> set[str]:
    """The modules of ``sfw_dist`` that import ``name`` or something in it."""
    return {module for module, found in IMPORTS.items() if any(f"{other}.".startswith(f"{name}.") for other in found)}


def test_every_unit_has_a_layer() -> None:
    """Fails when a new module is in no layer: add it to the lowest one of LAYERS that its imports allow."""
    placed = set().union(*LAYERS, APART)
    assert sum(map(len, LAYERS)) + len(APART) == len(placed), "a unit is in two layers"
    units = {unit(module) for module in SOURCES}
    assert not units - placed, f"in no layer of tests/test_layering.py: {', '.join(sorted(units - placed))}"
    assert not placed - units, f"in a layer, but not in sfw_dist: {', '.join(sorted(placed - units))}"


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_to_the_same_layer_or_an_earlier_one(module: str) -> None:
    """Fails when, say, the optimizer imports the configuration."""
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    mine = unit(module)
    if mine not in level | APART:
        pytest.skip("in no layer, of which test_every_unit_has_a_layer tells")
    for other in sorted(IMPORTS[module] & SOURCES.keys()):
        theirs = unit(other)
        if mine in APART:
            assert theirs in {mine, *APART[mine]}, f"{module} imports {other}: {mine} reads only a run's files"
        else:
            assert theirs not in APART, f"{module} imports {other}: {theirs} stands apart"
            assert level[theirs] <= level[mine], f"{module} imports {other}, which is in a later layer"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Fails when what can be imported depends on what was imported before."""
    graph = {module: found & SOURCES.keys() for module, found in IMPORTS.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("launch", set()),
        ("submitit", set()),
        ("ffcv", {"sfw_dist.data.loading.ffcv"}),
        ("deepspeed", {"sfw_dist.optim.deepspeed"}),
        ("triton", {"sfw_dist.optim.kernels.triton_kernels", "sfw_dist.optim.kernels.triton_layout"}),
    ],
)
def test_optional_parts_are_imported_in_one_place(name: str, allowed: set[str]) -> None:
    """Fails when training needs a cluster's, a loader's or an engine's package that it does not use."""
    assert users(name) <= allowed


@pytest.mark.parametrize("path", [*SOURCES.values(), *modules("launch").values()], ids=lambda path: path.name)
def test_files_are_short_and_named_for_what_they_do(path: Path) -> None:
    """Fails when a file has become two things, or collects what has no name."""
    lines = len(path.read_text().splitlines())
    assert lines <= MOST_LINES, f"{path.relative_to(ROOT)} has {lines} lines: split it"
    assert path.stem not in {"utils", "util", "helpers", "misc", "common"}


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    """Fails when the tests above are blind to an import in a function, for type checking, or relative."""
    package = tmp_path / "package"
    (package / "part").mkdir(parents=True)
    (package / "__init__.py").write_text("from .leaf import x\n")
    (package / "leaf.py").write_text("def f():\n    import torch.nn\n    from numpy import array\n")
    (package / "part" / "__init__.py").write_text("from . import inner\n")
    (package / "part" / "inner.py").write_text(
        "from typing import TYPE_CHECKING\nfrom package import leaf\nif TYPE_CHECKING:\n    from ..part import y\n"
    )
    sources = modules("package", tmp_path)
    found = {module: imports(module, path, set(sources)) for module, path in sources.items()}
    assert found == {
        "package": {"package.leaf"},
        "package.leaf": {"torch.nn", "numpy"},
        "package.part": {"package.part.inner"},
        "package.part.inner": {"typing", "package.leaf", "package.part"},
    }
