"""Checkpoints: atomic under a real SIGKILL, whole or refused, cut and joined without loss. (Exact resumes:
test_engine.py.)"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from datakit.errors import ConfigError, DatakitError
from trainer.engine.sharded_state import Cut, Piece, Shards, check_shard, describe, shard_file, share, write_shard
from trainer.training.checkpoint import SUMMARY, Checkpoints, Run, latest, whole

SHAPE = (6, 10)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Weights:
    """What an engine gives to save: one tensor."""

    def __init__(self, size: int = 8):
        self.updates, self.values = 0, torch.zeros(size)
        self.pieces = [Piece("w", (size,), None, 0, size, (0, size), dict)]

    def step(self) -> None:
        self.updates += 1
        self.values += 1

    def owned(self) -> dict[str, torch.Tensor]:
        return {"master/w": self.values}

    def about(self) -> dict[str, str]:
        return describe(self.pieces, {"w": self.values.shape}, self.updates)


def value(path: Path) -> float:
    """Of all the weights of a checkpoint, after its files are checked."""
    shards = Shards(path / "model")
    for file in shards.files:
        check_shard(file)
    size = shards.parameters["w"][0]
    values = shards.read("master", Piece("w", (size,), None, 0, size, (0, size), dict), 0, size)
    assert (values == values[0]).all()
    return float(values[0])


def save_steps(folder: Path, steps: int, **options) -> Checkpoints:
    weights = Weights()
    checkpoints = Checkpoints(folder, {"model": weights}, Run(settings={"seed": 1}), **options)
    for _ in range(steps):
        weights.step()
        checkpoints.save({"position": weights.updates})
    checkpoints.wait()
    return checkpoints


def test_what_is_saved_is_what_was_when_save_was_called(tmp_path):
    weights = Weights(1 << 20)
    checkpoints = Checkpoints(tmp_path, {"model": weights})
    weights.step()
    checkpoints.save({})
    weights.step()  # before the file is written
    checkpoints.wait()
    assert value(latest(tmp_path)) == 1.0


def test_files_put_into_the_opened_folder_are_part_of_it_and_it_is_told_once(tmp_path):
    weights, told = Weights(), []
    checkpoints = Checkpoints(tmp_path, {"model": weights}, Run(plan="p", selections=("a",)))
    weights.step()
    (checkpoints.opened() / "losses.txt").write_text("0.5")
    checkpoints.save({"position": 7})
    checkpoints.wait(lambda path, step: told.append((path.name, step)))
    checkpoints.poll(lambda path, step: told.append("again"))
    assert told == [("step-000001", 1)]
    path = checkpoints.latest()
    assert (path / "losses.txt").read_text() == "0.5"
    summary = json.loads((path / SUMMARY).read_text())
    assert (summary["step"], summary["loop"], summary["run"]) == (
        1,
        {"position": 7},
        {"plan": "p", "selections": ["a"], "settings": {}},
    )


@pytest.mark.parametrize(
    "keep, every, left", [(1, None, [5]), (2, None, [4, 5]), (2, 3, [3, 4, 5]), (9, None, [1, 2, 3, 4, 5])]
)
def test_the_newest_stay_and_those_of_round_steps(tmp_path, keep, every, left):
    save_steps(tmp_path, 5, keep_last=keep, keep_every=every)
    assert [path.name for path in whole(tmp_path)] == [f"step-{step:06d}" for step in left]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:06d}" for step in left]


def test_the_newest_is_the_one_written_last(tmp_path):
    """A run resumed from an older checkpoint writes lower steps, and then some again."""
    save_steps(tmp_path, 3)
    again = save_steps(tmp_path, 1)
    assert again.latest().name == "step-000001"
    assert [path.name for path in whole(tmp_path)] == ["step-000002", "step-000003", "step-000001"]


def test_of_checkpoints_saved_in_a_row_each_is_told(tmp_path):
    weights, told = Weights(), []
    checkpoints = Checkpoints(tmp_path, {"model": weights}, keep_last=1)
    for _ in range(3):
        weights.step()
        checkpoints.save({})
    checkpoints.save({})  # the same step again: it takes the other's place
    checkpoints.wait(lambda path, step: told.append(step))
    assert told == [1, 2, 3, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"] and value(checkpoints.latest()) == 3.0


def test_a_checkpoint_that_cannot_be_written_stops_the_run_at_the_next(tmp_path):
    weights = Weights()
    checkpoints = Checkpoints(tmp_path / "c", {"model": weights})
    (tmp_path / "c").rename(tmp_path / "gone")
    (tmp_path / "c").write_text("a file, where the folder was")
    with pytest.raises((DatakitError, OSError)):
        checkpoints.save({})
        checkpoints.wait()


def test_rank_0_waits_for_the_others_so_long_only(tmp_path):
    checkpoints = Checkpoints(tmp_path, {"model": Weights()}, timeout_s=0.2)
    checkpoints.world = 2
    checkpoints.save({})
    with pytest.raises(DatakitError, match="shard-00001-of-00002.safetensors did not appear within 0 s"):
        checkpoints.wait()
    assert latest(tmp_path) is None


def test_killed_while_it_writes_the_checkpoint_before_is_whole(tmp_path):
    """A process that saves 64 MB again and again gets a real SIGKILL in the midst of one."""
    for attempt in range(4):  # a kill may come between two
        folder = tmp_path / str(attempt)
        written = kill_a_writer(folder)
        found, left = latest(folder), list(folder.glob("*.partial"))
        assert value(found) == int(found.name.removeprefix("step-")) >= written - 1
        for path in whole(folder):
            assert value(path) == int(path.name.removeprefix("step-"))
        Checkpoints(folder, {"model": Weights()})  # a new run clears what is not whole, and only that
        assert latest(folder) == found and not list(folder.glob("*.*"))
        if left:
            return
    raise AssertionError("no kill came while a checkpoint was written")


def kill_a_writer(folder: Path) -> int:
    """The step that it was writing when it was seen last."""
    script = f"import test_sharded_state, pathlib; test_sharded_state.save_for_ever(pathlib.Path({str(folder)!r}))"
    paths = os.pathsep.join(
        (str(Path(__file__).parent), str(Path(__file__).parents[3]), str(Path(__file__).parents[2]))
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    )
    try:
        return wait_for_partial(folder, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def save_for_ever(folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    weights = Weights(16 << 20)
    checkpoints = Checkpoints(folder, {"model": weights}, keep_last=2)
    while True:
        weights.step()
        checkpoints.save({})


def wait_for_partial(folder: Path, process: subprocess.Popen) -> int:
    """Number of the first step after the second that is being written."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for path in folder.glob("step-*.partial/model/*.safetensors"):
            step = int(path.parts[-3].removeprefix("step-").removesuffix(".partial"))
            if step > 2:
                return step
        time.sleep(0.001)
    raise AssertionError("it saves nothing")


def test_damage_is_told_with_the_file(tmp_path):
    save_steps(tmp_path, 1)
    shard = next((tmp_path / "step-000001" / "model").glob("*.safetensors"))
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1])
    with pytest.raises(ConfigError, match=f"{shard} is damaged: {len(sound) - 1} bytes of {len(sound)}"):
        check_shard(shard)
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(ConfigError, match=f"{shard} is damaged: its checksum"):
        check_shard(shard)
    shard.write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match=f"{shard} is damaged"):
        Shards(shard.parent)
    shard.with_suffix(".json").unlink()
    with pytest.raises(ConfigError, match=f"{shard} is damaged.*json"):
        check_shard(shard)
    shard.rename(shard.with_name("shard-00000-of-00002.safetensors"))
    with pytest.raises(ConfigError, match="shard-00001-of-00002.safetensors is missing"):
        Shards(shard.parent)
    with pytest.raises(ConfigError, match="has no checkpoint in it"):
        Shards(tmp_path)


def test_a_checkpoint_of_another_model_is_told_by_names_and_shapes(tmp_path):
    save_steps(tmp_path, 1)
    shards = Shards(tmp_path / "step-000001" / "model")
    shards.check_model({"w": (8,)})
    with pytest.raises(ConfigError, match=r"w is \[8\] in it and \[9\] in the model"):
        shards.check_model({"w": (9,)})
    with pytest.raises(ConfigError, match="v is not in it; w is not in the model"):
        shards.check_model({"v": (8,)})


@pytest.mark.parametrize("written", ["whole", "slices", "rows", "columns"])
@pytest.mark.parametrize("read", ["whole", "slices", "rows", "columns"])
def test_a_parameter_cut_and_sliced_in_one_way_is_read_in_any_other(tmp_path, written, read):
    """Rows and columns are cut as tensor parallelism cuts joined linears: some of each section."""
    full = torch.arange(60.0).view(SHAPE)
    layouts = {
        "whole": [(None, 1)],
        "slices": [(None, 4)],
        "rows": [(Cut(0, ((0, 1), (2, 4))), 2), (Cut(0, ((1, 2), (4, 6))), 3)],
        "columns": [(Cut(1, ((0, 3), (6, 8))), 3), (Cut(1, ((3, 6), (8, 10))), 1)],
    }

    def pieces(name: str) -> list[Piece]:
        """One for each rank: a slice of a cut."""
        sizes = [(cut, n, (cut.take(full) if cut else full).numel()) for cut, n in layouts[name]]
        return [
            Piece("w", SHAPE, cut, *share(0, size, i, n), share(0, size, i, n), dict)
            for cut, n, size in sizes
            for i in range(n)
        ]

    def part(piece: Piece) -> torch.Tensor:
        return (piece.cut.take(full) if piece.cut else full).flatten()[piece.start : piece.stop].clone()

    ranks = pieces(written)
    for i, piece in enumerate(ranks):
        write_shard(tmp_path / shard_file(i, len(ranks)), {"master/w": part(piece)}, describe([piece], {"w": SHAPE}, 3))
    shards = Shards(tmp_path)
    assert shards.updates == 3 and shards.has("master") and not shards.has("ema")
    for piece in pieces(read):
        assert torch.equal(shards.read("master", piece, piece.start, piece.stop), part(piece))


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    half = Piece("w", (8,), None, 0, 4, (0, 4), dict)
    for i in range(2):  # both say that they have the first half
        write_shard(tmp_path / shard_file(i, 2), {"master/w": torch.zeros(4)}, describe([half], {"w": (8,)}, 1))
    with pytest.raises(ConfigError, match="lacks values 4 to 8 of w"):
        Shards(tmp_path).read("master", Piece("w", (8,), None, 0, 8, (0, 8), dict), 0, 8)
