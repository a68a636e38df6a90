"""The folder of a plan: what is written, what its hash is of, and what is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from datakit.errors import ConfigError
from support.plan_folders import bucket, plan_of, window
from trainer.planning.plan import LEFT_OUT, WINDOWS, Bucket, Part, Plan, check_target, plan_hash, write_plan

BUCKETS = [bucket(), bucket(frames=9, weight=0.5)]


def made(folder: Path, *windows: dict[str, Any], left_out: Sequence[dict[str, Any]] = (), **options: Any) -> Plan:
    batches = [pa.RecordBatch.from_pylist(list(windows), schema=WINDOWS)] if windows else []
    reasons = [pa.RecordBatch.from_pylist(list(left_out), schema=LEFT_OUT)] if left_out else []
    parts = [Part("one", 2.0, {"where": None}, "/c"), Part("two", 3.0, {}, "/d")]
    return write_plan(folder, BUCKETS, parts, {"fps": 24.0}, 7, {"clips": 3}, batches, reasons, **options)


def test_columns_that_are_never_null():
    names = {field.name for field in WINDOWS if not field.nullable}
    assert names == {"clip_id", "video_id", "part", "bucket", "first", "frames", "stride", "fps", "geometry"}
    assert not any(field.nullable for field in LEFT_OUT)


def test_a_plan_is_read_as_it_was_written(tmp_path):
    reason = {"clip_id": "x", "part": 1, "reason": "too short"}
    plan = made(tmp_path / "p", window(), window(1, caption=None), left_out=[reason] * 3, picture="<html>")
    for read in (plan, Plan.open(str(tmp_path / "p")), pickle.loads(pickle.dumps(plan))):
        assert read.folder == tmp_path / "p" and read.hash == plan.hash and len(plan.hash) == 32
        assert read.buckets == tuple(BUCKETS) and [p.weight for p in read.parts] == [2.0, 3.0]
        assert read.parts[0] == Part("one", 2.0, {"where": None}, "/c") and read.global_batches == 7
        assert read.settings == {"fps": 24.0} and read.counts == {"clips": 3}
        assert read.windows.num_rows == 2 and read.left_out.to_pylist() == [reason] * 3
        read.verify()
    recorded = json.loads((tmp_path / "p" / "plan.json").read_text())
    assert recorded["format"] == 1 and recorded["rows"] == {"windows": 2, "left_out": 3}
    assert (tmp_path / "p" / "plan.html").read_text() == "<html>" and (tmp_path / "p").stat().st_mode & 0o777 == 0o755
    assert not (made(tmp_path / "q").folder / "plan.html").exists()
    assert Bucket("b", 1, 1, 1, 1, 1).weight == 1.0


def test_windows_are_drawn_as_often_as_part_and_bucket_say(tmp_path):
    plan = made(tmp_path / "p", window())
    assert [plan.repeat(part, b) for part in (0, 1) for b in (0, 1)] == [2.0, 1.0, 3.0, 1.5]


def test_rows_by_index(tmp_path):
    plan = made(tmp_path / "p", *(window(first=i) for i in range(4)))
    assert [row["first"] for row in plan.rows([3, 0, 3])] == [3, 0, 3] and plan.rows([]) == []
    assert plan.rows([1]) == [window(first=1)] and plan.rows(np.array([1]), ["first", "part"]) == [
        {"first": 1, "part": 0}
    ]
    for wrong in (4, -1):
        with pytest.raises(IndexError, match=f"no window {wrong}: the plan has 4"):
            plan.rows([0, wrong])


def test_batches_have_65536_rows(tmp_path):
    """Rows are found by that number."""
    count = 65_536 + 2
    columns = {f.name: pa.repeat(pa.scalar(window()[f.name], f.type), count) for f in WINDOWS}
    table = pa.table(columns | {"first": pa.array(range(count), pa.int32())}, WINDOWS)
    write_plan(tmp_path / "p", [bucket()], [], {}, 1, {}, table.to_batches(65_536), [])
    rows = Plan.open(tmp_path / "p").rows([0, 65_535, 65_536, 65_537], ["first"])
    assert [row["first"] for row in rows] == [0, 65_535, 65_536, 65_537]


def hashed(buckets: list[Bucket], weights: list[float], batches: int, rows: list[dict[str, Any]]) -> str:
    """From the description: the decisions as JSON; then, column by column, which values are null, lengths of texts and
    texts, or values (0 for null). Not where files lie."""
    plain = [
        {name: getattr(b, name) for name in ("name", "height", "width", "frames", "batch", "tokens", "weight")}
        for b in buckets
    ]
    decided = {"format": 1, "buckets": plain, "parts": weights, "global_batches": batches}
    digest = hashlib.blake2b(json.dumps(decided).encode(), digest_size=16, person=b"datakit-plan")
    for field in WINDOWS:
        values = [row[field.name] for row in rows]
        if field.name in ("uri", "path"):
            continue
        digest.update(bytes(value is None for value in values))
        if pa.types.is_string(field.type):
            texts = [(value or "").encode() for value in values]
            digest.update(struct.pack(f"<{len(texts)}i", *map(len, texts)) + b"".join(texts))
        else:
            digest.update(np.array([value or 0 for value in values], field.type.to_pandas_dtype()).tobytes())
    return digest.hexdigest()


def test_the_hash_is_of_all_that_decides_what_is_trained_on(tmp_path):
    rows = [
        window(caption=None, motion_vmaf=None, clip_id="ä" * 3),
        window(1, caption="", split=None, fps=23.976),
        window(1, caption="a longer one", start_pts=None, first=5),
    ]
    plan = made(tmp_path / "p", *rows)
    assert plan.hash == hashed(BUCKETS, [2.0, 3.0], 7, rows)
    batch = pa.RecordBatch.from_pylist(rows, schema=WINDOWS)
    for part in (slice(1, 3), slice(0, 1), slice(0, 0)):
        taken = batch.slice(part.start, part.stop - part.start)  # offsets into the whole's buffers
        assert plan_hash(BUCKETS, [], 7, [taken]) == hashed(BUCKETS, [], 7, rows[part])
    same = pa.RecordBatch.from_pylist([{**row, "uri": "/b.mp4", "path": "/x"} for row in rows], schema=WINDOWS)
    assert plan_hash(BUCKETS, plan.parts, 7, [same]) == plan.hash


def test_a_changed_file_is_noticed(tmp_path):
    folder = made(tmp_path / "p", window(clip_id="abcdefgh" * 4)).folder
    raw = (folder / "windows.arrow").read_bytes()
    (folder / "windows.arrow").write_bytes(raw.replace(b"abcdefgh", b"abcdefgi", 1))
    with pytest.raises(ConfigError, match="windows.arrow was changed after planning"):
        Plan.open(folder).verify()


@pytest.mark.parametrize(
    "old, new, why",
    [
        ('"format": 1', '"format": 2', "has format 2, this datakit reads 1"),
        ('"windows": 1', '"windows": 2', "windows.arrow does not belong to its plan.json"),
        ('"left_out": 0', '"left_out": 1', "left_out.arrow does not belong to its plan.json"),
        ('"plan_hash"', '"hash"', "damaged"),
        ('"tokens"', '"tokns"', "damaged"),
    ],
)
def test_a_plan_that_is_not_whole_is_refused(tmp_path, old, new, why):
    file = made(tmp_path / "p", window()).folder / "plan.json"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=why):
        Plan.open(tmp_path / "p")


def test_json_that_is_no_plan(tmp_path):
    for text, why in (("[1]", "has format None"), ("{}", "has format None"), ("{", "damaged"), (None, "no plan at")):
        (tmp_path / "plan.json").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ConfigError, match=why):
            Plan.open(tmp_path)


def test_other_columns_are_refused(tmp_path):
    folder = made(tmp_path / "p", window()).folder
    table = Plan.open(folder).windows.drop_columns(["caption"])
    with pa.OSFile(str(folder / "windows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ConfigError, match="windows.arrow does not belong"):
        Plan.open(folder)


def test_where_a_plan_may_be_written(tmp_path):
    for fine in (tmp_path / "new" / "deep", tmp_path / "empty", made(tmp_path / "plan").folder):
        (tmp_path / "empty").mkdir(exist_ok=True)
        check_target(fine)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    for taken in (tmp_path / "other", tmp_path / "other" / "file"):
        with pytest.raises(ConfigError, match="is there and is no plan: give another --out"):
            check_target(taken)
        with pytest.raises(ConfigError, match="is there and is no plan"):
            made(taken, overwrite=True)
    assert (
        made(tmp_path / "empty", window()).windows.num_rows
        == made(tmp_path / "new" / "deep", window()).windows.num_rows
    )
    assert (tmp_path / "other" / "file").read_text() == "mine"


def test_another_plan_is_replaced_only_if_asked(tmp_path):
    first = made(tmp_path / "p", window())
    made(tmp_path / "p", window(), picture="the same plan, drawn")
    assert (tmp_path / "p" / "plan.html").exists()
    with pytest.raises(ConfigError, match="holds another plan"):
        made(tmp_path / "p", window(first=1))
    assert Plan.open(tmp_path / "p").hash == first.hash
    second = made(tmp_path / "p", window(first=1), overwrite=True)
    assert Plan.open(tmp_path / "p").hash == second.hash != first.hash
    (tmp_path / "p" / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match="holds another plan"):
        made(tmp_path / "p", window())
    made(tmp_path / "p", window(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["p"], "nothing is left beside it"


def test_a_plan_is_written_whole_or_not_at_all(tmp_path):
    def broken():
        yield pa.RecordBatch.from_pylist([window()], schema=WINDOWS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_plan(tmp_path / "p", [], [], {}, 1, {}, broken(), [])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="the plan cannot be written to .*file/p: "):
        made(tmp_path / "file" / "p", window())


def test_hand_made_plans_are_sorted(tmp_path):
    plan = plan_of(tmp_path / "p", [window(1), window(0)], BUCKETS)
    assert plan.windows["bucket"].to_pylist() == [0, 1]
