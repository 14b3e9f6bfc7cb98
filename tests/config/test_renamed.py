"""Old names in files, in run folders and on the command line."""

from __future__ import annotations

import pytest
import yaml

from sfw_dist.config import Config, GMPConfig, OptimizerConfig, PruneConfig, load_config, save_config
from sfw_dist.config.renamed import translate_arguments
from sfw_dist.pruning.options import OLD_KINDS
from tests.support.config_files import Write, error_of, parse

NEW = Config(
    name="run",
    method="gmp",
    optimizer=OptimizerConfig(name="sgd", lr=0.1),
    gmp=GMPConfig(sparsity=0.8, ranking="layerwise"),
)
OLD = """\
optimizer: {name: sgd, lr: 0.1}
method: gradual
gradual: {sparsity: 0.8, kind: layerwise}
"""


def test_a_file_with_old_names_means_the_same(write: Write) -> None:
    """Fails when `method: gradual` of version 0.1.0 is an unknown value, or its section an unknown key."""
    assert load_config(write(OLD)) == NEW


def test_old_names_in_a_base_and_new_ones_above_them(write: Write) -> None:
    """Fails when names are translated after the files are merged: the base's section would replace the newer one."""
    write(OLD, "base.yaml")
    config = load_config(write("base: base.yaml\nname: run\ngmp: {sparsity: 0.7}\n"))
    assert (config.method, config.gmp.sparsity, config.gmp.ranking) == ("gmp", 0.7, "layerwise")


def test_a_run_folder_of_version_0_1_0_loads(write: Write) -> None:
    """Fails when a run that was trained before the renaming cannot be resumed or evaluated."""
    saved = yaml.safe_load(save_config(NEW))
    saved["method"], saved["gradual"] = "gradual", saved.pop("gmp")
    saved["gradual"]["kind"] = saved["gradual"].pop("ranking")
    saved["optimizer"]["overlap"] = False
    del saved["optimizer"]["constraint"]["arguments"]
    assert load_config(write(yaml.safe_dump(saved), "config.yaml")) == NEW


@pytest.mark.parametrize("equals", [True, False])
def test_the_command_line_takes_old_names(equals: bool) -> None:
    """Fails when a study's arguments or a script of earlier days are refused."""
    pairs = {"name": "run", "optimizer.name": "sgd", "optimizer.lr": "0.1", "method": "gradual"}
    pairs |= {"gradual.sparsity": "0.8", "gradual.kind": "layerwise"}
    joined = [f"--{key}={value}" for key, value in pairs.items()]
    apart = [part for key, value in pairs.items() for part in (f"--{key}", value)]
    assert parse(*(joined if equals else apart)) == NEW


def test_other_arguments_stay_as_they_are() -> None:
    """Fails when a run that is called gradual, or a path, is renamed."""
    argv = ["--config", "gradual.yaml", "--name", "gradual", "--optimizer.lr=1", "--json"]
    assert translate_arguments(argv) == argv


def test_a_misspelt_name_is_still_an_error(write: Write) -> None:
    """Fails when translating hides an unknown key."""
    assert "unknown key gradually" in error_of("--config", write("gradually: {sparsity: 0.5}\n"))


@pytest.mark.parametrize("kind", OLD_KINDS)
def test_prune_kind_is_read_wherever_it_stands(kind: str, write: Write) -> None:
    """Fails when old runs and configurations cannot be read, or are pruned in another way."""
    granularity, ranking = OLD_KINDS[kind]
    expected = PruneConfig(granularity=granularity, ranking=ranking)
    assert load_config(write(f"prune: {{kind: '{kind}'}}")).prune == expected
    assert parse("--name", "a", "--prune.kind", kind).prune == expected
    assert parse("--name", "a", f"--prune.kind={kind}").prune == expected


def test_prune_kind_in_a_base_and_new_words_above_it(write: Write) -> None:
    """Fails when a base in the old words contradicts a file in the new ones, or wins over it."""
    write("prune: {kind: filters-layerwise, scope: all}", "base.yaml")
    found = load_config(write("base: base.yaml\nprune: {granularity: weight}")).prune
    assert found == PruneConfig(scope="all", granularity="weight", ranking="layerwise")
    assert load_config(write("base: base.yaml\nprune: {kind: global}")).prune == PruneConfig(scope="all")


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("{kind: rank}", "prune: unknown kind 'rank': choose one of global, layerwise"),
        ("{kind: filters, ranking: global}", "prune: kind filters is an older word"),
    ],
)
def test_a_wrong_prune_kind_in_a_file_is_told_with_the_file(section: str, told: str, write: Write) -> None:
    """Fails when an unknown old word is passed over, or one of two that contradict each other."""
    path = write(f"prune: {section}")
    message = error_of("--config", path)
    assert told in message and str(path) in message


@pytest.mark.parametrize("argv", [["--prune.kind", "blocks"], ["--prune.kind"]])
def test_a_wrong_prune_kind_on_the_command_line_is_told(argv: list[str]) -> None:
    """Fails with a traceback, or when the word is passed over."""
    assert "prune: unknown kind" in error_of("--name", "a", *argv)


def test_the_torch_backend_of_version_0_1_0_is_the_memory_map(write: Write) -> None:
    """Fails when a run that read its data with the backend that is gone cannot be resumed."""
    assert load_config(write("name: run\ndata: {backend: torch}\n")).data.backend == "ram"


@pytest.mark.parametrize(
    "both", ["gmp: {sparsity: 0.9}\ngradual: {sparsity: 0.8}", "gradual: {kind: global, ranking: global}"]
)
def test_an_old_word_next_to_its_new_one_is_refused(write: Write, both: str) -> None:
    """Fails when the later of the two replaces the earlier without a word."""
    assert "is an older word for" in error_of("--config", write(f"name: run\n{both}\n"))
