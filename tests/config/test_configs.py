"""The configurations in configs/: every one loads, has a name of its own, and repeats nothing of its base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sfw_dist.config import load_config, read_yaml
from tests.support.config_files import leaves

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "cluster")
RECIPES = [path for path in FILES if path.parent.name != "paper"]


def label(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_every_configuration_loads(path: Path) -> None:
    """Fails when a field is renamed and a file in configs/ is forgotten."""
    load_config(path)


@pytest.mark.parametrize("path", RECIPES, ids=label)
def test_a_run_is_named_after_data_set_and_recipe(path: Path) -> None:
    """Fails when two configurations would train into one folder, or one for another data set than its folder's."""
    config = load_config(path)
    assert config.name == f"{path.parent.name}_{path.stem}"
    assert config.data.name == path.parent.name


def differences(path: Path) -> Iterator[tuple[str, Any]]:
    """The values in a file that equal those it would inherit."""
    tree = yaml.safe_load(path.read_text())
    inherited = dict(leaves(read_yaml(path.parent / tree.pop("base")))) if "base" in tree else {}
    for key, value in leaves(tree):
        if key in inherited and inherited[key] == value:
            yield key, value


@pytest.mark.parametrize("path", FILES, ids=label)
def test_no_value_of_a_base_is_repeated(path: Path) -> None:
    """Fails when a value is copied: whoever changes it in the base changes half of the recipes."""
    assert list(differences(path)) == []


def test_the_published_hyperparameters_stand_in_one_place() -> None:
    """Fails when a recipe for a data set leaves the paper's values, or the demo's files move."""
    assert {"digits/sfw", "digits/sgd", "paper/resnet18", "paper/vgg16"} <= {label(path) for path in FILES}
    for network in ("resnet18", "vgg16"):
        paper = read_yaml(FOLDER / "paper" / f"{network}.yaml")
        for data in ("cifar10", "fashion_mnist", "tiny_imagenet"):
            recipe = read_yaml(FOLDER / data / ("sfw.yaml" if network == "resnet18" else "sfw_vgg16.yaml"))
            assert recipe.pop("name") == f"{data}_sfw{'_vgg16' if network == 'vgg16' else ''}"
            assert recipe["data"].pop("name") == data
            assert recipe == paper
