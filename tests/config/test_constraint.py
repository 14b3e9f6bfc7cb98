"""The fields of the constraint set."""

from __future__ import annotations

from typing import Any

import pytest

from sfw_dist.config import ConstraintConfig, OptimizerConfig, load_config, save_config
from sfw_dist.config.constraint import constraint_class
from sfw_dist.constraints import (
    Constraint,
    GroupKSupportBall,
    LpBall,
    NuclearBall,
    SpectralKSupportBall,
    constraint_kinds,
)
from sfw_dist.errors import UserError
from tests.support.config_files import Write, error_of, parse


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("set: group_k_support, k_frac: 0.3, k_min: 2", GroupKSupportBall(k_frac=0.3, k_min=2, tau=15.0)),
        ("set: nuclear, tau: 3", NuclearBall(tau=3.0)),
        ("set: nuclear, svd: power, radius: 2", NuclearBall(radius=2.0, svd="power")),
        (
            "set: spectral_k_support, k_frac: 0.1, diameter: 5, svd: exact",
            SpectralKSupportBall(k_frac=0.1, k_min=10, diameter=5.0, svd="exact"),
        ),
    ],
)
def test_sets_of_filters_and_of_low_rank(write: Write, fields: str, expected: Constraint) -> None:
    """Fails when an option is read and does not reach the set."""
    config = load_config(write(f"name: a\noptimizer: {{constraint: {{{fields}}}}}\n"))
    assert config.optimizer.constraint.build() == expected


@pytest.mark.parametrize(
    ("text", "key", "value", "remedy"),
    [
        ("optimizer: {constraint: {k_frac: 5}}", "optimizer.constraint: k_frac", "5.0", "write 0.05"),
        ("optimizer: {constraint: {tau: -1}}", "optimizer.constraint: tau", "-1.0", "tau=15"),
        ("optimizer: {constraint: {tau: 1, radius: 2}}", "optimizer.constraint:", "'radius': 2.0", "exactly one of"),
        ("optimizer: {constraint: {tau: 1, diameter: 2}}", "optimizer.constraint:", "'tau': 1.0", "exactly one of"),
        ("optimizer: {constraint: {set: lp, p: 0.5}}", "optimizer.constraint: p", "0.5", "at least 1"),
        ("optimizer: {constraint: {set: nuclear, svd: fast}}", "optimizer.constraint.svd", "fast", "'power'"),
        ("optimizer: {constraint: {set: group_k_support, k_frac: 5}}", "optimizer.constraint: k_frac", "5.0", "0.05"),
        ("engine: fsdp\noptimizer: {constraint: {set: nuclear}}", "constraint.set", "nuclear", "write engine: ddp"),
    ],
)
def test_a_bad_value_is_refused_in_one_line(write: Write, text: str, key: str, value: str, remedy: str) -> None:
    """Fails when a mistake in a file is passed over, crashes later, or its message lacks key, value or remedy."""
    message = error_of("--config", write(text))
    for part in (key, value, remedy):
        assert part in message


class DoubledBall(LpBall):
    """A user's own set: the L2 ball of twice the given radius; ``factor`` is an argument of its own."""

    kind = "doubled_ball"

    def __init__(self, radius: float, factor: float = 2.0) -> None:
        super().__init__(p=2, radius=radius * factor)


OWN = f"{__name__}:DoubledBall"


@pytest.mark.parametrize("name", constraint_kinds())
def test_every_registered_set_can_be_named(name: str) -> None:
    """Fails when a new set in sfw_dist.constraints needs a change in the configuration, too."""
    if ":" not in name and constraint_class(name).__module__.startswith("sfw_dist."):
        assert type(ConstraintConfig(set=name).build()) is constraint_class(name)


def test_a_set_of_ones_own_by_import_path(write: Write) -> None:
    """Fails when a user's set cannot be named in YAML, gets fields it does not take, or is lost in a saved file."""
    text = f"optimizer: {{constraint: {{set: '{OWN}', radius: 3, arguments: {{factor: 4}}}}}}\n"
    config = load_config(write(text))
    assert config.optimizer.constraint.build() == DoubledBall(3.0, factor=4.0)
    assert load_config(write(save_config(config))) == config
    plain = parse("--name", "a", "--optimizer.constraint.set", OWN, "--optimizer.constraint.radius", "2")
    assert plain.optimizer.constraint.build() == DoubledBall(2.0)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ("set: k_spares", ["'k_spares'", "did you mean k_sparse?", "nuclear", "package.module:ClassName"]),
        ("set: 'no.such:Set'", ["cannot import no.such:Set", "No module named 'no'", "subclass of"]),
        ("set: 'math:Set'", ["cannot import math:Set", "no attribute 'Set'"]),
        ("set: 'math:pi'", ["math:pi is no constraint set", "subclass of"]),
        ("set: ':'", ["cannot import :"]),
        (f"set: '{OWN}'", ["optimizer.constraint:", "'radius'"]),
        (f"set: '{OWN}', radius: 1, arguments: {{size: 2}}", ["arguments.size", "radius, factor"]),
    ],
)
def test_a_set_that_cannot_be_made_is_one_line(write: Write, fields: str, parts: list[str]) -> None:
    message = error_of("--config", write(f"optimizer: {{constraint: {{{fields}}}}}\n"))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("fields", "field", "takes"),
    [
        ("set: lp, k_frac: 0.1", "k_frac", "p, tau, diameter, radius"),
        ("set: k_sparse, svd: exact", "svd", "k_frac, k_min, tau"),
        ("p: 1", "p", "k_frac, k_min, tau"),
        ("set: unconstrained, tau: 3", "tau", "takes none"),
    ],
)
def test_a_field_that_the_set_does_not_take_is_refused(write: Write, fields: str, field: str, takes: str) -> None:
    """Fails when a setting without effect is accepted: a study would be blind to it."""
    path = write(f"optimizer: {{constraint: {{{fields}}}}}\n")
    message = error_of("--config", path)
    assert str(path) in message and f"optimizer.constraint.{field} is no field of the set" in message
    assert takes in message and "remove it" in message


def test_a_field_on_the_command_line_must_be_one_of_the_set_s(write: Write) -> None:
    """Fails when an override has no effect and nobody is told."""
    file = write("optimizer: {constraint: {set: lp, p: 1, tau: 3}}\n")
    assert "k_frac is no field of the set lp" in error_of("--config", file, "--optimizer.constraint.k_frac=0.1")
    taken_back = parse(
        "--config", file, "--optimizer.constraint.set", "unconstrained", "--optimizer.constraint.tau", "null"
    )
    assert taken_back.optimizer.constraint.set == "unconstrained"


def test_inherited_fields_of_another_set_are_left_out(write: Write) -> None:
    """Fails when a configuration cannot change the set of its base, or a saved one of such a run does not load."""
    write("optimizer: {constraint: {set: k_sparse, k_frac: 0.1, tau: 3}}\n", "base.yaml")
    config = load_config(write("base: base.yaml\noptimizer: {constraint: {set: lp, p: 2}}\n"))
    assert config.optimizer.constraint.build() == LpBall(p=2, tau=3.0)
    assert load_config(write(save_config(config))) == config


@pytest.mark.parametrize(
    ("fields", "projects"),
    [({"set": "lp", "p": p}, p in (1, 2, float("inf"))) for p in (1, 2, 3, float("inf"))]
    + [({"set": "unconstrained"}, True), ({"set": "k_sparse"}, False), ({"set": "nuclear"}, False)],
)
def test_projected_sgd_takes_sets_with_a_projection(fields: dict[str, Any], projects: bool) -> None:
    """Fails when a set without projection is refused only at the first step, or one with it before."""
    constraint = ConstraintConfig(**fields)
    assert constraint.has_projection == projects
    if projects:
        OptimizerConfig(name="projected_sgd", lr=0.1, constraint=constraint)
    else:
        with pytest.raises(UserError, match=r"optimizer\.constraint\.set must be a set with a projection"):
            OptimizerConfig(name="projected_sgd", lr=0.1, constraint=constraint)
