"""Latents of nothing, for timing: a plan of one bucket, a Parquet file of random latents, and the index that loaders
read."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from trainer.data.latent_reader import INDEX
from trainer.planning.plan import ROWS, WINDOWS, Bucket, Part, Plan, write_plan

GROUP = 8
"""Latents of a row group: some MB, as `datakit run encode` writes them."""


def synthetic_latents(
    folder: Path, bucket: Bucket, shape: tuple[int, int, int, int], count: int, global_batches: int = 1
) -> tuple[Plan, Path]:
    """A plan of `count` windows, and the index of their latents, bf16.

    Args:
        shape: of a latent, [c, T, H, W].
    """
    row = {
        "clip_id": "c" * 32,
        "video_id": "v" * 32,
        "part": 0,
        "uri": "/none.mp4",
        "path": None,
        "stream": 0,
        "time_base": "1/24",
        "start_pts": 0,
        "end_pts": bucket.frames,
        "crop_x": 0,
        "crop_y": 0,
        "crop_width": bucket.width,
        "crop_height": bucket.height,
        "width": bucket.width,
        "height": bucket.height,
        "kind": "video",
        "bucket": 0,
        "frames": bucket.frames,
        "stride": 1,
        "fps": 24.0,
        "caption": "nothing",
        "motion_vmaf": 4.0,
        "split": "train",
        "geometry": "0" * 16,
    }
    rows = [{**row, "first": i} for i in range(count)]
    batches = [pa.RecordBatch.from_pylist(rows[i : i + ROWS], schema=WINDOWS) for i in range(0, count, ROWS)]
    plan = write_plan(
        folder / "plan",
        [bucket],
        [Part("nothing", 1.0, {"content_hash": ""}, "")],
        {},
        global_batches,
        {},
        batches,
        [],
        overwrite=True,
    )
    return plan, _write(folder, shape, count)


def _write(folder: Path, shape: tuple[int, ...], count: int) -> Path:
    file = folder / "latents.parquet"
    bits = (
        np.random.default_rng(0).normal(size=shape).astype("<f4").view("<u4") >> 16
    )  # bfloat16: the upper half of a float32
    latent = bits.astype("<u2").tobytes()
    schema = pa.schema(
        [
            ("mean", pa.binary()),
            ("std", pa.binary()),
            ("dtype", pa.string()),
            ("shape", pa.list_(pa.int32())),
            ("geometry", pa.string()),
        ]
    )
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, count, GROUP):
            n = min(GROUP, count - start)
            writer.write_table(
                pa.table(
                    {
                        "mean": [latent] * n,
                        "std": [latent] * n,
                        "dtype": ["bfloat16"] * n,
                        "shape": [list(shape)] * n,
                        "geometry": ["0" * 16] * n,
                    },
                    schema=schema,
                )
            )
    index = folder / "latents.arrow"
    table = pa.table(
        {
            "window": list(range(count)),
            "file": [str(file)] * count,
            "row_group": [i // GROUP for i in range(count)],
            "row": [i % GROUP for i in range(count)],
        },
        schema=INDEX,
    )
    with pa.OSFile(str(index), "wb") as sink, pa.ipc.new_file(sink, INDEX) as writer:
        writer.write_table(table)
    return index
