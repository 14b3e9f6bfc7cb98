"""The search for the sparsity that an accuracy budget buys, on made-up accuracies and on a real run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sfw_dist.config import load_config, save_config
from sfw_dist.evaluate.__main__ import main
from sfw_dist.evaluate.pruned_models import PrunedModels
from sfw_dist.evaluate.sparsity_search import GRID, search, search_run, stays_within
from sfw_dist.evaluate.sweep import sweep_run
from sfw_dist.train.metrics import Metrics
from sfw_dist.train.run_folder import RunFolder
from tests.support.training import ONE_PROCESS


def _recorded(within: Callable[[int], bool]) -> tuple[int, list[int]]:
    """What the search finds, and what it asks for after the grid."""
    asked: list[int] = []

    def answer(sparsities: Sequence[int]) -> list[bool]:
        asked.extend(sparsities)
        return [within(sparsity) for sparsity in sparsities]

    found = search(answer)
    assert tuple(asked[: len(GRID)]) == GRID and len(asked) == len(set(asked)), "something was measured twice"
    return found, asked[len(GRID) :]


@pytest.mark.parametrize("edge", [0, 1, 99, 100, 101, 637, 899, 900, 909, 910, 989, 994, 997, 998])
def test_a_monotone_accuracy_gives_its_edge_exactly(edge: int) -> None:
    """The answer is one step off, in particular next to a point of the grid."""
    found, asked = _recorded(lambda sparsity: sparsity <= edge)
    assert found == edge and len(asked) <= 7


def test_everything_within_is_the_end_of_the_grid() -> None:
    """The search runs off the grid, or asks for a network without weights."""
    assert _recorded(lambda _: True) == (999, [])


def test_nothing_within_is_the_dense_network() -> None:
    """There is always an answer, for the dense network loses nothing."""
    found, asked = _recorded(lambda sparsity: sparsity == 0)
    assert found == 0 and asked == [50, 25, 12, 6, 3, 1]


def test_a_dip_does_not_hide_a_higher_sparsity() -> None:
    """From 45 to 62 % too much is lost, up to 93.3 % not: bisecting the whole range would stop at the dip."""
    found, asked = _recorded(lambda sparsity: sparsity <= 933 and not 450 <= sparsity <= 620)
    assert found == 933 and all(930 < sparsity < 940 for sparsity in asked)


def test_between_grid_points_the_answer_is_good_and_its_neighbour_bad() -> None:
    """Whatever the accuracy does: what is answered was measured as within, and 0.1 points more as not."""

    def ragged(sparsity: int) -> bool:
        return sparsity == 0 or (sparsity * 7919) % 13 < 5

    asked: dict[int, bool] = {}

    def answer(sparsities: Sequence[int]) -> list[bool]:
        asked.update({sparsity: ragged(sparsity) for sparsity in sparsities})
        return [asked[sparsity] for sparsity in sparsities]

    found = search(answer)
    assert asked[found] and asked.get(found + 1, found == GRID[-1]) is (found == GRID[-1])
    assert not any(asked[sparsity] for sparsity in GRID if sparsity > found)


@pytest.mark.parametrize(
    ("dense", "pruned", "points", "within"),
    [
        (99, 98, 1.0, True),  # 0.99 - 0.98 is a little more than 0.01
        (99, 97, 1.0, False),
        (98, 99, 0.0, True),
        (99, 99, 0.0, True),
        (99, 98, 0.0, False),
        (99, 98, 0.99, False),
        (30, 29, 1.0, True),
    ],
)
def test_a_tie_is_within(dense: int, pruned: int, points: float, within: bool) -> None:
    """Rounding decides whether exactly one point is at most one point."""
    before, after = (Metrics(hits / 100, 1.0, 0.1, 100) for hits in (dense, pruned))
    assert stays_within(before, after, points) is within


def test_the_file_holds_the_search_and_one_test_accuracy(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test images take part in the search; or the answer is of other networks than its file says."""
    splits: list[str] = []
    measure = PrunedModels.measure

    def noted(self: PrunedModels, split: str, prunings: list[object], statistics: list[object]) -> object:
        splits.append(split)
        assert split == "validation" or len(prunings) == 2, "the dense network and the one that was found"
        return measure(self, split, prunings, statistics)  # type: ignore[arg-type]

    monkeypatch.setattr(PrunedModels, "measure", noted)
    result = search_run(run, ONE_PROCESS, 10.0, export=True)
    assert splits == ["validation"] * (len(splits) - 1) + ["test"] and len(splits) > 2
    path = run.prune / "max_drop_10.0.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))

    rows = {row["sparsity"]: row for row in result["searched"]}
    assert list(rows) == sorted(rows) and len(rows) == len(GRID) + len(splits) - 2
    found = result["sparsity"]
    assert rows[found]["within"] and rows[found] == result["validation"] and rows[found]["drop"] <= 10
    assert not rows[round(found + 0.001, 3)]["within"] and result["bn_recalibrated"]
    assert rows[0.0]["drop"] == 0 and {row["samples"] for row in rows.values()} == {136}

    dense, alone = sweep_run(run, ONE_PROCESS, sparsities=[0.0, found], export=True)
    assert dense["top1_recalibrated"] == result["test_dense"]["top1"]
    assert (alone["top1_recalibrated"], alone["samples"]) == (result["test"]["top1"], result["test"]["samples"])
    assert alone["parameters_kept"] == result["parameters_kept"]
    exported, same = (load_file(path.with_suffix(".safetensors")) for path in (path, run.prune / f"s{found:.4f}.json"))
    assert all(exported[name].equal(tensor) for name, tensor in same.items())


def test_without_recalibration_the_dense_network_is_as_trained(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dense accuracy is of other statistics than the pruned ones, and the budget means nothing."""
    assert main([str(run.path), "--max-drop", "2.5", "--recalibrate", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    last = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    trained = next(record for record in reversed(last) if record["event"] == "epoch")
    assert result["searched"][0]["top1"] == trained["validation_top1"] and not result["bn_recalibrated"]
    assert (run.prune / "max_drop_2.5.json").is_file()


def test_what_is_printed(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """A reader cannot see what was tried, or takes the end of the search for a limit of the network."""
    assert main([str(run.path), "--max-drop", "99.9"]) == 0
    said = capsys.readouterr().out
    assert said.count("yes") == len(GRID) and "the search goes no higher" in said
    assert "sparsity 0.999" in said and "BatchNorm recalibrated" in said and "on 451 images" in said


def test_without_validation_images_it_is_refused(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would search on the test images, or on images that the network was trained on."""
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    other.weights.write_bytes(run.weights.read_bytes())
    config = load_config(run.config)
    config.data.validation_fraction = 0.0
    other.config.write_text(save_config(config))
    assert main([str(other.path), "--max-drop", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "data.validation_fraction 0" in error and "train with 0.1" in error
