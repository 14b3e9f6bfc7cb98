"""Reads and checks the file of a study."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from sfw_dist.errors import UserError
from sfw_dist.pruning.sparsities import parse_sparsities

KEYS = ("title", "seeds", "sparsities", "arguments", "arms")
ARM_KEYS = ("label", "config", "arguments")
OPTIONAL = ("arguments",)
SET_BY_STUDY = ("config", "seed", "runs_dir", "name", "resume")
"""Options of the training that the study sets itself."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    label: str
    config: str  # the file's path, as written
    arguments: dict[str, Any] = field(hash=False)  # by dotted name, those of every arm included


@dataclass(frozen=True)
class Study:
    """Arms × seeds, each pruned to the same sparsities."""

    name: str  # of its file
    title: str
    seeds: tuple[int, ...]
    sparsities_text: str  # as written
    arms: tuple[Arm, ...]
    text: str  # of its file

    @property
    def sparsities(self) -> list[float]:
        """Ascending."""
        return parse_sparsities(self.sparsities_text)

    def only(self, names: Sequence[str]) -> Study:
        """Return the study with only these arms.

        Raises:
            UserError: the study has no arm of that name.
        """
        known = [arm.name for arm in self.arms]
        for name in names:
            if name not in known:
                raise UserError(f"--only {name}: no such arm, choose from {', '.join(known)}")
        return replace(self, arms=tuple(arm for arm in self.arms if arm.name in names))


def read_study(path: Path) -> Study:
    """Read a study's file.

    Raises:
        UserError: the file cannot be read, lacks a key, has an unknown one, or a value outside its domain.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read the study {path} ({error.strerror}): see experiments/studies/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML ({' '.join(str(error).split())}): correct that place") from None
    tree = _mapping(tree, KEYS, str(path))
    arms = tree["arms"]
    if not isinstance(arms, dict) or not arms:
        raise UserError(
            f"{path}: arms is {arms!r}: write one as 'sfw: {{label: SFW, config: configs/digits/sfw.yaml}}'"
        )
    shared = _arguments(tree, str(path))
    return Study(
        name=_name(path.stem, str(path)),
        title=_text(tree, "title", str(path)),
        seeds=_seeds(tree["seeds"], path),
        sparsities_text=_sparsities(tree["sparsities"], path),
        arms=tuple(_arm(name, value, shared, path) for name, value in arms.items()),
        text=text,
    )


def _mapping(value: Any, keys: Sequence[str], where: str) -> dict[str, Any]:
    """Return ``value`` if it is a mapping with all of these keys, except optional ones, and no other."""
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r}: write 'key: value' lines with {', '.join(keys)}")
    for key in value:
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}: the keys are {', '.join(keys)}")
    for key in keys:
        if key not in value and key not in OPTIONAL:
            raise UserError(f"{where}: no {key}: the keys are {', '.join(keys)}")
    return value


def _arm(name: Any, value: Any, shared: dict[str, Any], path: Path) -> Arm:
    where = f"{path}, arm {name}"
    tree = _mapping(value, ARM_KEYS, where)
    return Arm(
        name=_name(name, where),
        label=_text(tree, "label", where),
        config=_text(tree, "config", where),
        arguments=shared | _arguments(tree, where),
    )


def _name(value: Any, where: str) -> str:
    """Part of a folder's name."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
        raise UserError(f"{where}: {value!r} is part of a folder's name: write letters, digits, '_', '-' and '.'")
    return value


def _text(tree: dict[str, Any], key: str, where: str) -> str:
    value = tree[key]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key} is {value!r}: write a line of text")
    return " ".join(value.split())


def _arguments(tree: dict[str, Any], where: str) -> dict[str, Any]:
    value = tree.get("arguments", {})
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{where}: arguments is {value!r}: write it as {{optimizer.lr: 0.1}}")
    for key, setting in value.items():
        if key in SET_BY_STUDY:
            raise UserError(f"{where}: the study sets {key} itself: remove it from arguments")
        if isinstance(setting, dict):
            raise UserError(f"{where}: {key} is {setting!r}: write each setting by its dotted name, as optimizer.lr")
    return value


def _seeds(value: Any, path: Path) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(type(seed) is int and seed >= 0 for seed in value)
    if not whole or not value or len(set(value)) < len(value):
        raise UserError(f"{path}: seeds is {value!r}: write different whole numbers from 0 on, as in [0, 1, 2]")
    return tuple(value)


def _sparsities(value: Any, path: Path) -> str:
    text = str(value) if type(value) in (int, float) else value
    if not isinstance(text, str):
        raise UserError(f'{path}: sparsities is {value!r}: write them as in "0,0.5,0.9:0.99:0.01"')
    if 0.0 not in parse_sparsities(text):
        raise UserError(f"{path}: sparsities {text} lack 0: add it, for drops are measured from the dense network")
    return text
