"""Checkpoints: every bit comes back, each is whole or absent, and reading one runs no code."""

from __future__ import annotations

import os
import pickle
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.metadata as dcp_metadata
import torch.distributed.tensor as dtensor
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from sfw_dist.distributed.world import World
from sfw_dist.errors import UserError
from sfw_dist.train import checkpoint

LONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def tensors() -> dict[str, Tensor]:
    """One tensor of every kind that training has, values that only their own dtype can hold among them."""
    special = [float("nan"), float("inf"), -0.0, 1e-45]
    return {
        "model.fp32": torch.tensor([*special, 1 / 3]),
        "model.fp64": torch.tensor([*special, 1 / 3, 1e-300], dtype=torch.float64),
        "model.bf16": torch.randn(3, 5).bfloat16(),
        "model.bn.num_batches_tracked": torch.tensor(2**53 + 1),
        "model.channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "optimizer.momentum_buffer.w": torch.nn.Parameter(torch.randn(7)),
        "optimizer.step.w": torch.tensor(123, dtype=torch.int64),
        "empty": torch.empty(0, 3),
    }


def save(folder: Path, *, epoch: int = 1, step: int = 10, **state: Any) -> Path:
    return checkpoint.save(folder, tensors(), state, LONE, epoch=epoch, step=step)


def fake(folder: Path, name: str) -> Path:
    """A folder that looks like a complete checkpoint."""
    path = folder / name
    path.mkdir()
    (path / "state.json").write_text("{}")
    return path


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


def error_of_loading(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        checkpoint.load(path)
    message = str(raised.value)
    assert "\n" not in message and str(path) in message and "remove it" in message
    return message


# A round trip


def test_every_tensor_comes_back_bit_by_bit(tmp_path: Path) -> None:
    """Fails when a resumed run starts from rounded, reshaped or missing tensors."""
    saved = tensors()
    loaded, _ = checkpoint.load(checkpoint.save(tmp_path, saved, {}, LONE, epoch=1, step=2))
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(loaded[name]) == bits(tensor), name


def test_the_state_comes_back_as_json(tmp_path: Path) -> None:
    """Fails when the position or the schedule of a resumed run is not the one saved."""
    state = {"position": {"epoch": 3, "loss_sums": [0.1, 2.5]}, "schedule": {"dynamic": None}}
    assert checkpoint.load(save(tmp_path, **state))[1] == state


def test_a_checkpoint_is_read_into_the_tensors_that_it_is_given(tmp_path: Path) -> None:
    """Fails when an engine's own tensors stay as they were, or a second copy of the network is made."""
    path, mine = save(tmp_path), torch.zeros(5)

    def allocate(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        expected = {name: (t.dtype, t.shape) for name, t in tensors().items()}
        assert {name: (t.dtype, t.shape) for name, t in stored.items()} == expected
        assert all(tensor.is_meta for tensor in stored.values())
        return {"model.fp32": mine}

    loaded, _ = checkpoint.load(path, allocate)
    assert loaded == {"model.fp32": mine} and loaded["model.fp32"] is mine
    assert bits(mine) == bits(tensors()["model.fp32"])


def test_who_gives_the_tensors_may_refuse_the_checkpoint(tmp_path: Path) -> None:
    """Fails when a checkpoint of another model is called unreadable, and the user removes it."""

    def allocate(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        raise UserError("another model's")

    with pytest.raises(UserError, match=r"^another model's$"):
        checkpoint.load(save(tmp_path), allocate)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_each_rank_reads_its_own_shard(tmp_path: Path, ranks: int) -> None:
    """Fails when a whole tensor does not come back in uneven shards, or a rank without rows cannot read."""
    whole = torch.randn(4, 3)
    path = checkpoint.save(tmp_path, {"w": whole}, {}, LONE, epoch=1, step=1)
    for rank in range(ranks):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)  # its messages go nowhere
        try:
            mesh = init_device_mesh("cpu", (ranks,))
            mine = dtensor.empty(4, 3, device_mesh=mesh, placements=[dtensor.Shard(0)])
            checkpoint.load(path, lambda stored, mine=mine: {"w": mine})
            shards = whole.chunk(ranks)
            assert torch.equal(mine.to_local(), shards[rank] if rank < len(shards) else whole[:0])
        finally:
            dist.destroy_process_group()


def test_one_process_is_not_warned_of_missing_ranks(tmp_path: Path) -> None:
    """Fails when torch's warning that it takes this process for the only one reaches the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.load(save(tmp_path))


# Which checkpoints there are


def test_a_checkpoint_is_latest_once_it_is_whole(tmp_path: Path) -> None:
    """Fails when a resume finds no checkpoint, or the folder is not named after epoch and step."""
    path = save(tmp_path, epoch=7, step=123)
    assert path == tmp_path / "epoch_0007.step_000123"
    assert checkpoint.pointed(tmp_path, "latest") == checkpoint.newest(tmp_path) == path
    assert checkpoint.pointed(tmp_path, "best") is None


def test_pointers_move_and_name_only_complete_checkpoints(tmp_path: Path) -> None:
    """Fails when ``best`` leads to a folder that was removed, or out of the run."""
    first, second = fake(tmp_path, "epoch_0001.step_000010"), fake(tmp_path, "epoch_0002.step_000020")
    checkpoint.point(tmp_path, "best", first)
    assert checkpoint.pointed(tmp_path, "best") == first
    checkpoint.point(tmp_path, "best", second)
    assert checkpoint.pointed(tmp_path, "best") == second
    (second / "state.json").unlink()
    assert checkpoint.pointed(tmp_path, "best") is None
    (tmp_path / "best").write_text("../elsewhere\n")
    assert checkpoint.pointed(tmp_path, "best") is None


def test_the_newest_is_by_number_not_by_name(tmp_path: Path) -> None:
    """Fails when epoch 10000 sorts before epoch 9999, or a save within an epoch before the one at its start."""
    assert checkpoint.newest(tmp_path / "absent") is None
    names = ["epoch_0009.step_000900", "epoch_9999.step_999900", "epoch_10000.step_999999", "epoch_10000.step_1000000"]
    for name in names:
        path = fake(tmp_path, name)
        assert checkpoint.newest(tmp_path) == path


def test_the_newest_is_never_half_written(tmp_path: Path) -> None:
    """Fails when a run resumes from what a killed process left, or from a folder that is something else."""
    whole = save(tmp_path, epoch=1)
    fake(tmp_path, ".epoch_0002.step_000020")
    (tmp_path / "epoch_0003.step_000030").mkdir()
    fake(tmp_path, "epoch_0004.step_000040.bak")
    fake(tmp_path, "epoch_four.step_000040")
    assert checkpoint.newest(tmp_path) == whole


@pytest.mark.parametrize(("count", "kept"), [(1, [2, 5]), (2, [2, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_are_kept_and_the_best(tmp_path: Path, count: int, kept: list[int]) -> None:
    """Fails when cleaning up removes the best checkpoint, the newest one, or nothing."""
    paths = {epoch: fake(tmp_path, f"epoch_{epoch:04d}.step_{epoch:06d}") for epoch in range(1, 6)}
    checkpoint.point(tmp_path, "best", paths[2])
    checkpoint.keep_newest(tmp_path, count)
    assert [epoch for epoch, path in paths.items() if path.exists()] == kept


# Saves that fail


def test_a_failed_save_leaves_the_former_checkpoint_and_is_cleared_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when a full disk costs the last good checkpoint, or its leftovers stay for ever."""
    former = save(tmp_path, epoch=1)

    def disk_is_full(path: Path, value: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_json", disk_is_full)
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, epoch=2)
    assert checkpoint.newest(tmp_path) == checkpoint.pointed(tmp_path, "latest") == former
    assert bits(checkpoint.load(former)[0]["model.fp32"]) == bits(tensors()["model.fp32"])

    third = save(tmp_path, epoch=3)
    assert {path.name for path in tmp_path.iterdir()} == {former.name, third.name, "latest"}


def test_a_checkpoint_can_be_saved_again(tmp_path: Path) -> None:
    """Fails when a run that stops twice at one step trips over its own checkpoint."""
    save(tmp_path, attempt=1)
    path = save(tmp_path, attempt=2)
    assert checkpoint.load(path)[1] == {"attempt": 2}


def test_a_checkpoint_is_its_owners_even_without_a_umask(tmp_path: Path) -> None:
    """Fails when others may put their own files into a checkpoint that is resumed from."""
    umask = os.umask(0)
    try:
        path = save(tmp_path)
    finally:
        os.umask(umask)
    assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


# Damaged ones


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("__0_0.distcp", lambda content: content[: len(content) // 2]),
        ("__0_0.distcp", lambda content: b"\0" * len(content)),
        ("__0_0.distcp", None),
        (".metadata", lambda content: content[:-20]),
        (".metadata", lambda content: b""),
        (".metadata", lambda content: pickle.dumps({"state_dict_metadata": {}})),
        (".metadata", None),
        ("state.json", lambda content: b'{"position": '),
        ("state.json", lambda content: b"\xff\xfe"),
        ("state.json", None),
    ],
)
def test_a_damaged_checkpoint_is_named_in_one_line(
    tmp_path: Path, file: str, damage: Callable[[bytes], bytes] | None
) -> None:
    """Fails when a damaged file ends in a traceback of torch's, or is taken for good."""
    path = save(tmp_path)
    if damage is None:
        (path / file).unlink()
    else:
        (path / file).write_bytes(damage((path / file).read_bytes()))
    error_of_loading(path)


def test_no_wrong_byte_in_the_metadata_ends_in_a_traceback(tmp_path: Path) -> None:
    """Fails when an exception of the unpickler, which may be of almost any type, escapes."""
    path = checkpoint.save(tmp_path, {"w": torch.ones(3)}, {}, LONE, epoch=1, step=1)
    content = (path / ".metadata").read_bytes()
    refused = 0
    for position in range(0, len(content), 5):
        (path / ".metadata").write_bytes(
            content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]
        )
        try:
            checkpoint.load(path)
        except UserError:
            refused += 1
    assert refused > 50


# Malicious ones


class Evil:
    """Unpickling calls ``function(*arguments)``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


@pytest.mark.parametrize("function", [os.system, eval, getattr, torch.load, torch.hub.load])
@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_that_names_code_is_refused_before_it_runs(
    tmp_path: Path, function: Callable[..., Any], nested: bool
) -> None:
    """Fails when resuming from somebody's checkpoint runs somebody's code."""
    path = save(tmp_path)
    marker = tmp_path / "marker"
    calls = {os.system: [f"touch {marker}"], eval: [f"open({str(marker)!r}, 'w')"], getattr: [torch.int8, "is_signed"]}
    call = calls.get(function, [str(marker)])
    metadata: Any = Evil(function, *call)
    if nested:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        metadata.planner_data = [Evil(function, *call)]
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    message = error_of_loading(path)
    assert "which no checkpoint of sfw_dist does" in message and function.__name__ in message
    assert not marker.exists()


def test_enums_are_read_as_older_pythons_write_them(tmp_path: Path) -> None:
    """Python 3.11.2 writes a member as getattr(class, name): no run resumes there, for getattr is refused."""
    path = save(tmp_path)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    member = dcp_metadata._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    metadata.planner_data = [Evil(getattr, type(member), member.name)]
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    checkpoint.load(path)
    assert checkpoint._Reader(path).read_metadata().planner_data == [member]


def test_tensor_files_are_read_without_pickled_code(tmp_path: Path) -> None:
    """Fails when the tensors themselves are unpickled without torch's ``weights_only``."""
    path = checkpoint.save(tmp_path, {"w": torch.ones(3)}, {}, LONE, epoch=1, step=1)
    marker = tmp_path / "marker"
    torch.save(Evil(os.system, f"touch {marker}"), path / "__0_0.distcp")
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, (path / "__0_0.distcp").stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    error_of_loading(path)
    assert not marker.exists()
