"""The import rules, checked on the source without running it.

``sfw_dist`` is made of units: the modules and packages directly below it. The library (``LIBRARY``) is what a script of
one's own takes; torch and numpy are all that it imports, and it never imports the application (``APPLICATION``), which
knows configurations, files, data sets and runs. Both are listed from the bottom up: a unit imports only from its own
layer or an earlier one, and no modules import each other in a circle. So the mathematics can be read, tested and used
alone, and whoever changes a layer knows that only the later ones can break. Apart from the layers stands ``report``,
which reads the files of a run, and of the library knows the words for prunings alone.

Third parties that may be missing are each imported in one place: FFCV in ``data/loading/ffcv.py``, DeepSpeed in
``optim/deepspeed.py``, Triton in two files of ``optim/kernels``, submitit in ``launch/slurm.py``,
and torch-pruning in ``deploy/channel_graph.py``. Nothing of
``sfw_dist`` imports ``launch``.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LIBRARY = (
    {"errors"},
    {"files", "distributed"},
    {"ops"},
    {"constraints", "pruning"},
    {"optim", "deploy"},
)
APPLICATION = (
    {"__init__", "models", "config"},
    {"data"},
    {"train"},
    {"evaluate"},
)
LAYERS = (*LIBRARY, *APPLICATION)
APART = {"report": {"errors", "files", "pruning"}}

LIBRARY_NEEDS = {"torch", "numpy"}
TRITON = {"sfw_dist.optim.kernels.triton_kernels", "sfw_dist.optim.kernels.triton_layout"}
DEEPSPEED = {"sfw_dist.optim.deepspeed"}
DRAWING = {"sfw_dist.pruning.measuring.curve"}
"""What of the library draws, if asked to: matplotlib is imported then, and may be missing."""
ONE_PLACE = {
    "launch": set(),
    "submitit": {"launch.slurm"},
    "ffcv": {"sfw_dist.data.loading.ffcv"},
    "deepspeed": DEEPSPEED,
    "triton": TRITON,
    "torch_pruning": {"sfw_dist.deploy.channel_graph"},
}
"""The only modules that may import a package; of ``launch``, the only ones of ``sfw_dist``."""

MOST_LINES = {".py": 400, ".cpp": 950}
"""The kernels of the CPU are one file, because they are compiled as one."""
MOST_ENTRIES = 15
"""Modules and folders of a package, without ``__init__.py``."""


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: str, root: Path = ROOT) -> dict[str, Path]:
    """All modules of a package by dotted name."""
    return {module_name(path, root): path for path in sorted((root / package).rglob("*.py"))}


def imports(module: str, path: Path, known: set[str], *, at_import: bool = False) -> set[str]:
    """The dotted names that ``module`` imports.

    ``from package import name`` is an import of ``package.name`` if that is one of the ``known`` modules.

    Args:
        module: its dotted name.
        path: its file.
        known: the modules that there are.
        at_import: only what is imported as soon as ``module`` is; else imports in functions and for type checking too.
    """
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    found = set()
    for node in _run_at_import(tree) if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package) if node.level else str(node.module)
            submodules = {f"{source}.{alias.name}" for alias in node.names} & known
            found |= submodules
            if len(submodules) < len(node.names):
                found.add(source)
    return found


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below ``node`` without the bodies of functions and of ``if TYPE_CHECKING:``."""
    for child in ast.iter_child_nodes(node):
        typing_only = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        if not typing_only and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _run_at_import(child)


SOURCES = modules("sfw_dist")
LAUNCH = modules("launch")
IMPORTS = {module: imports(module, path, set(SOURCES)) for module, path in SOURCES.items()}


def unit(module: str) -> str:
    """``sfw_dist.data.sampler`` is part of ``data``; ``sfw_dist`` itself is ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def users(name: str, found: dict[str, set[str]]) -> set[str]:
    """The modules that import ``name`` or something in it."""
    return {module for module, names in found.items() if any(f"{other}.".startswith(f"{name}.") for other in names)}


def third_parties(module: str) -> set[str]:
    """The packages that a module imports, without Python's own and ours."""
    packages = {name.partition(".")[0] for name in IMPORTS[module]}
    return packages - set(sys.stdlib_module_names) - {"sfw_dist"}


def loaded_with(module: str) -> set[str]:
    """Every module of ``sfw_dist`` that is imported when ``module`` is."""
    loaded: set[str] = set()
    unseen = [module]
    while unseen:
        name = unseen.pop()
        if name in SOURCES and name not in loaded:
            loaded.add(name)
            unseen += [name.rpartition(".")[0], *imports(name, SOURCES[name], set(SOURCES), at_import=True)]
    return loaded


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
    assert mine in level | APART, f"{mine} is in no layer"
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


@pytest.mark.parametrize("module", [name for name in SOURCES if {unit(name)} & set().union(*LIBRARY, {"__init__"})])
def test_the_library_needs_torch_and_numpy_alone(module: str) -> None:
    """Fails when who wants the optimizer must install what the application needs."""
    optional = {package for package, places in ONE_PLACE.items() if module in places}
    optional |= {"matplotlib"} if module in DRAWING else set()
    assert third_parties(module) <= LIBRARY_NEEDS | optional


def test_importing_the_library_loads_neither_triton_deepspeed_nor_the_application() -> None:
    """Fails when ``import sfw_dist`` imports an optional package, or takes the seconds that it takes."""
    loaded = loaded_with("sfw_dist")
    assert {"sfw_dist.optim.sfw", "sfw_dist.pruning.one_shot"} <= loaded, "the test does not see imports"
    assert not loaded & (TRITON | DEEPSPEED)
    assert {unit(module) for module in loaded} <= set().union(*LIBRARY, {"__init__"})


@pytest.mark.parametrize("name", ONE_PLACE)
def test_optional_parts_are_imported_in_one_place(name: str) -> None:
    """Fails when training needs a cluster's, a loader's or a strategy's package that it does not use."""
    launch = {module: imports(module, path, set(LAUNCH)) for module, path in LAUNCH.items()}
    found = IMPORTS if name == "launch" else IMPORTS | launch
    assert users(name, found) == ONE_PLACE[name]


@pytest.mark.parametrize(
    "path",
    [*SOURCES.values(), *LAUNCH.values(), *(ROOT / "sfw_dist").rglob("*.cpp")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_are_short_and_named_for_what_they_do(path: Path) -> None:
    """Fails when a file has become two things, or collects what has no name."""
    lines = len(path.read_text().splitlines())
    assert lines <= MOST_LINES[path.suffix], f"{path.relative_to(ROOT)} has {lines} lines: split it"
    assert path.stem not in {"utils", "util", "helpers", "misc", "common"}


@pytest.mark.parametrize("package", ["sfw_dist", "launch", "experiments", "benchmarks"])
def test_folders_have_few_entries(package: str) -> None:
    """Fails when a folder has become a heap in which nothing is found: group its modules."""
    for folder in (ROOT / package, *(path.parent for path in (ROOT / package).rglob("*/__init__.py"))):
        entries = [path.name for path in folder.iterdir() if path.suffix in {".py", ".cpp"} or path.is_dir()]
        entries = [name for name in entries if name not in {"__init__.py", "__pycache__"}]
        assert len(entries) <= MOST_ENTRIES, f"{folder.relative_to(ROOT)} has {len(entries)} entries"


@pytest.mark.parametrize("package", [name for name, path in SOURCES.items() if path.stem == "__init__"])
def test_no_module_has_the_name_of_what_its_package_hands_on(package: str) -> None:
    """Fails when ``from sfw_dist.x import y`` is the function or the module, depending on what was imported before."""
    folder = SOURCES[package].parent
    imported = (node for node in ast.parse(SOURCES[package].read_text()).body if isinstance(node, ast.ImportFrom))
    handed_on = {alias.asname or alias.name for node in imported for alias in node.names if node.module != package}
    inside = {path.stem for path in folder.glob("*.py")} | {path.name for path in folder.iterdir() if path.is_dir()}
    assert not handed_on & inside


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    """Fails when the tests above are blind to an import in a function, for type checking, or relative."""
    package = tmp_path / "package"
    (package / "part").mkdir(parents=True)
    (package / "__init__.py").write_text("from .leaf import x\n")
    (package / "leaf.py").write_text("def f():\n    import torch.nn\n    from numpy import array\n")
    (package / "part" / "__init__.py").write_text("from . import inner\n")
    (package / "part" / "inner.py").write_text(
        "from typing import TYPE_CHECKING\nwith f():\n    from package import leaf\n"
        "if TYPE_CHECKING:\n    from ..part import y\n"
    )
    sources = modules("package", tmp_path)
    found = {module: imports(module, path, set(sources)) for module, path in sources.items()}
    assert found == {
        "package": {"package.leaf"},
        "package.leaf": {"torch.nn", "numpy"},
        "package.part": {"package.part.inner"},
        "package.part.inner": {"typing", "package.leaf", "package.part"},
    }
    at_import = {m: imports(m, path, set(sources), at_import=True) for m, path in sources.items()}
    assert at_import == found | {"package.leaf": set(), "package.part.inner": {"typing", "package.leaf"}}
