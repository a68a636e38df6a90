"""The plan of a training run: a folder that says which windows of which clips train, in which bucket, and why others do
not.

Everything that a loader needs is in it: no catalog is opened after planning.

- `plan.json`: buckets, parts, settings, the plan's hash and counts.
- `windows.arrow`: a row per trainable window (`WINDOWS`), sorted by (bucket, video_id, start_pts, first, part,
  clip_id).
- `left_out.arrow`: a row per selected clip without a window (`LEFT_OUT`).
- `plan.html`: a picture of it, for people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from datakit.atomic import atomic_folder
from datakit.column_hash import feed_nulls, feed_values
from datakit.errors import ConfigError

FORMAT = 1
"""Version of the folder's form: a plan of another one is refused."""
ROWS = 65_536
"""Rows of a record batch of `windows.arrow`, all but the last: row i lies in batch i // ROWS."""

WINDOWS = pa.schema(
    [
        pa.field("clip_id", pa.string(), False),
        pa.field("video_id", pa.string(), False),
        pa.field("part", pa.int32(), False),  # index into `Plan.parts`
        pa.field("uri", pa.string()),  # of the source
        pa.field("path", pa.string()),  # of the clip file, absolute; null: read the source by span
        pa.field("stream", pa.int32()),
        pa.field("time_base", pa.string()),
        pa.field("start_pts", pa.int64()),
        pa.field("end_pts", pa.int64()),  # the clip's span
        pa.field("crop_x", pa.int32()),
        pa.field("crop_y", pa.int32()),  # picture inside black borders, never null
        pa.field("crop_width", pa.int32()),
        pa.field("crop_height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),  # display size
        pa.field("kind", pa.string()),  # video or image
        pa.field("bucket", pa.int32(), False),  # index into `Plan.buckets`
        pa.field("first", pa.int32(), False),  # index of the first frame inside the clip
        pa.field("frames", pa.int32(), False),  # chosen frames
        pa.field("stride", pa.int32(), False),  # source frames per chosen frame; 0: by timestamps
        pa.field("fps", pa.float64(), False),  # of the chosen frames; 0: one frame
        pa.field("caption", pa.string()),
        pa.field("motion_vmaf", pa.float32()),
        pa.field("split", pa.string()),
        pa.field("geometry", pa.string(), False),  # 16 hex digits: of everything that decides the pixels
    ]
)
LEFT_OUT = pa.schema(
    [
        pa.field("clip_id", pa.string(), False),
        pa.field("part", pa.int32(), False),
        pa.field("reason", pa.string(), False),
    ]
)
WHERE_IT_LIES = ("uri", "path")
"""Columns that the hash of a plan leaves out: files may be moved."""


@dataclass(frozen=True)
class Bucket:
    """A shape that batches have.

    Attributes:
        name: `HEIGHTxWIDTHxFRAMES`.
        height, width: pixels.
        frames: of a window; 1: images.
        batch: samples of a micro-batch.
        tokens: of one sample, video and text together.
        weight: how often a window of it is drawn in an epoch, times its part's weight.
    """

    name: str
    height: int
    width: int
    frames: int
    batch: int
    tokens: int
    weight: float = 1.0


@dataclass(frozen=True)
class Part:
    """A selection that the plan was made of.

    Attributes:
        name: for people.
        weight: how often each of its windows is drawn in an epoch, times its bucket's weight.
        selection: `Selection.as_dict()`.
        catalog: its address.
    """

    name: str
    weight: float
    selection: dict[str, Any]
    catalog: str


@dataclass(frozen=True)
class Plan:
    """See the module.

    Attributes:
        hash: 32 hex digits, of all that decides what is trained on: buckets, parts' weights, `global_batches` and every
            column of the windows except where files lie. The same snapshot and settings give the same hash.
        settings: `PlanSettings` as they were resolved, the budget included.
        global_batches: micro-batches of an optimizer step.
        counts: what was counted while planning (see `trainer.planning.build_plan.count`).
    """

    folder: Path
    hash: str
    buckets: tuple[Bucket, ...]
    settings: dict[str, Any]
    parts: tuple[Part, ...]
    global_batches: int
    counts: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Plan:
        """Raises:
        ConfigError: no plan there, a damaged one, or one of another format.
        """
        folder = Path(folder)
        recorded = _read_json(folder)
        try:
            plan = cls(
                folder,
                recorded["plan_hash"],
                tuple(Bucket(**b) for b in recorded["buckets"]),
                recorded["settings"],
                tuple(Part(**p) for p in recorded["parts"]),
                recorded["global_batches"],
                recorded["counts"],
            )
        except (KeyError, TypeError) as e:
            raise ConfigError(f"{folder}/plan.json is damaged ({e}): make the plan again (datakit plan)") from e
        for name, table, schema in (("windows", plan.windows, WINDOWS), ("left_out", plan.left_out, LEFT_OUT)):
            if not table.schema.equals(schema) or table.num_rows != recorded["rows"][name]:
                raise ConfigError(
                    f"{folder}/{name}.arrow does not belong to its plan.json: make the plan again (datakit plan)"
                )
        return plan

    @cached_property
    def windows(self) -> pa.Table:
        """Memory-mapped: a million rows cost no memory until they are looked at."""
        return _mapped(self.folder / "windows.arrow")

    @cached_property
    def left_out(self) -> pa.Table:
        return _mapped(self.folder / "left_out.arrow")

    def rows(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Windows by index, in the order asked for, as dictionaries.

        Raises:
            IndexError: no such window.
        """
        return [_row(self.windows, index, columns) for index in indices]

    def repeat(self, part: int, bucket: int) -> float:
        """How often every window of a part and bucket is drawn in an epoch; 1: exactly once."""
        return self.parts[part].weight * self.buckets[bucket].weight

    def commonest_bucket(self) -> tuple[Bucket, pa.Table]:
        """The bucket that has most windows, of videos if there are any; and its windows."""
        numbers = self.windows["bucket"].to_numpy()
        counts = np.bincount(numbers, minlength=len(self.buckets))
        chosen = max(range(len(self.buckets)), key=lambda i: (self.buckets[i].frames > 1, counts[i]))
        first = int(np.searchsorted(numbers, chosen))  # the plan is sorted by bucket
        return self.buckets[chosen], self.windows.slice(first, int(counts[chosen]))

    def verify(self) -> None:
        """Read every window and compare with the hash.

        Raises:
            ConfigError: it is not what was planned.
        """
        found = plan_hash(self.buckets, self.parts, self.global_batches, self.windows.to_batches())
        if found != self.hash:
            raise ConfigError(
                f"{self.folder}/windows.arrow was changed after planning: make the plan again (datakit plan)"
            )

    def __reduce__(self):  # a worker process maps the files itself
        return Plan.open, (self.folder,)


def write_plan(
    folder: str | Path,
    buckets: Sequence[Bucket],
    parts: Sequence[Part],
    settings: dict[str, Any],
    global_batches: int,
    counts: dict[str, Any],
    windows: Iterable[pa.RecordBatch],
    left_out: Iterable[pa.RecordBatch],
    picture: str | None = None,
    overwrite: bool = False,
) -> Plan:
    """Write a plan whole or not at all: it is made aside and renamed.

    Args:
        windows: batches of `ROWS` rows, in the order that the module says.
        picture: HTML page.
        overwrite: replace another plan.

    Raises:
        ConfigError: something is there already: another plan (without `overwrite`), or no plan at all; it cannot be
            written.
    """
    folder = Path(folder).absolute()
    check_target(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as aside:
            digest = _digest(buckets, parts, global_batches)
            rows = {
                "windows": _write_batches(aside / "windows.arrow", WINDOWS, windows, digest),
                "left_out": _write_batches(aside / "left_out.arrow", LEFT_OUT, left_out),
            }
            recorded = {
                "format": FORMAT,
                "plan_hash": digest.hexdigest(),
                "rows": rows,
                "global_batches": global_batches,
                "buckets": [asdict(b) for b in buckets],
                "parts": [asdict(p) for p in parts],
                "settings": settings,
                "counts": counts,
            }
            (aside / "plan.json").write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n")
            if picture is not None:
                (aside / "plan.html").write_text(picture)
            check_target(folder)
            if not overwrite:
                _check_same(folder, digest.hexdigest())
    except OSError as e:
        raise ConfigError(f"the plan cannot be written to {folder}: {e.strerror or e}") from e
    return Plan.open(folder)


def plan_hash(
    buckets: Sequence[Bucket], parts: Sequence[Part], global_batches: int, windows: Iterable[pa.RecordBatch]
) -> str:
    """See `Plan.hash`."""
    digest = _digest(buckets, parts, global_batches)
    for batch in windows:
        _hash_batch(digest, batch)
    return digest.hexdigest()


def check_target(folder: Path) -> None:
    """Raises:
    ConfigError: something is there that is no plan.
    """
    if folder.exists() and not (folder / "plan.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there and is no plan: give another --out")


def _check_same(folder: Path, made: str) -> None:
    """Raises:
    ConfigError: another plan is there.
    """
    if (folder / "plan.json").is_file() and _hash_there(folder) != made:
        raise ConfigError(
            f"{folder} holds another plan, and a run may be at work on it: give another --out, or --overwrite"
        )


def _hash_there(folder: Path) -> str | None:
    try:
        return json.loads((folder / "plan.json").read_text()).get("plan_hash")
    except ValueError:
        return None


def _read_json(folder: Path) -> dict[str, Any]:
    try:
        recorded = json.loads((folder / "plan.json").read_text())
    except OSError as e:
        raise ConfigError(f"no plan at {folder}: `datakit plan --catalog DIR --out {folder}` makes one") from e
    except ValueError as e:
        raise ConfigError(f"{folder}/plan.json is damaged ({e}): make the plan again (datakit plan)") from e
    if not isinstance(recorded, dict) or recorded.get("format") != FORMAT:
        found = recorded.get("format") if isinstance(recorded, dict) else None
        raise ConfigError(
            f"the plan at {folder} has format {found}, this datakit reads {FORMAT}: make it again (datakit plan)"
        )
    return recorded


def _mapped(path: Path) -> pa.Table:
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowInvalid) as e:
        raise ConfigError(f"{path} is missing or damaged: make the plan again (datakit plan)") from e


def _row(windows: pa.Table, index: int, columns: Sequence[str] | None) -> dict[str, Any]:
    if not 0 <= index < windows.num_rows:
        raise IndexError(f"no window {index}: the plan has {windows.num_rows}")
    chunk, inside = divmod(int(index), ROWS)
    return {name: windows.column(name).chunk(chunk)[inside].as_py() for name in columns or windows.column_names}


def _write_batches(
    path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], digest: hashlib.blake2b | None = None
) -> int:
    rows = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            if digest is not None:
                _hash_batch(digest, batch)
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


def _digest(buckets: Sequence[Bucket], parts: Sequence[Part], global_batches: int):
    decided = {
        "format": FORMAT,
        "buckets": [asdict(b) for b in buckets],
        "parts": [p.weight for p in parts],
        "global_batches": global_batches,
    }
    return hashlib.blake2b(json.dumps(decided).encode(), digest_size=16, person=b"datakit-plan")


def _hash_batch(digest: hashlib.blake2b, batch: pa.RecordBatch) -> None:
    """Feed rows, column by column: which are null, lengths of texts, values; whatever their place in Arrow's buffers
    is."""
    for name in batch.schema.names:
        if name not in WHERE_IT_LIES:
            feed_nulls(digest, batch.column(name))
            feed_values(digest, batch.column(name))
