"""What README and the manual point to is there, and the map of the code is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import PAGES, ROOT, code_spans, links, page_id

ARCHITECTURE = ROOT / "docs" / "architecture.md"
MAPPED = ("sfw_dist", "launch", "experiments")
NAMING_PAGES = ("sfw_dist", "launch", "experiments", "benchmarks", "configs", "examples", "results")
TEXTS = (".py", ".md", ".yaml")
PATH = re.compile(r"[\w.*-]+(/[\w.*-]+)*(/|\.(py|cpp|md|yaml|toml|txt|sbatch|sh))")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_files(page: Path) -> None:
    """A link of a page leads nowhere."""
    missing = [target for target in links(page) if not (page.parent / target).exists()]
    assert not missing


def test_pages_named_in_the_source_exist() -> None:
    """A help text sends the reader to a page that was moved."""
    sources = [path for folder in NAMING_PAGES for path in (ROOT / folder).rglob("*.*") if path.suffix in TEXTS]
    named = {(path, page) for path in sources for page in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text())}
    missing = [(path.name, page) for path, page in named if not (ROOT / page).exists()]
    assert named and not missing


def test_every_page_is_in_the_navigation() -> None:
    """A page exists that no menu shows."""
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    shown = set(re.findall(r": ([\w/-]+\.md)", yaml.safe_dump(navigation)))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert shown == pages


def test_paths_on_the_map_exist() -> None:
    """docs/architecture.md names a file that was moved or renamed."""
    named = [span for span in code_spans(ARCHITECTURE) if PATH.fullmatch(span)]
    missing = [path for path in named if not _exists(path)]
    assert len(named) > 100
    assert not missing


def test_every_module_is_on_the_map() -> None:
    """A new module is missing in docs/architecture.md, so nobody finds it there."""
    named = set(code_spans(ARCHITECTURE))
    modules = [path for package in MAPPED for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py"]
    missing = [
        path.relative_to(ROOT).as_posix()
        for path in modules
        if not {path.relative_to(ROOT).as_posix(), path.relative_to(ROOT).as_posix().removeprefix("sfw_dist/")} & named
    ]
    assert not missing


def _exists(path: str) -> bool:
    """Whether a path, or a pattern, is one of the repository's or of the package's."""
    return any(next(folder.glob(path.rstrip("/")), None) is not None for folder in (ROOT, ROOT / "sfw_dist"))
