"""When two catalogs are equal: all tables but `runs`, times and run ids aside."""

from __future__ import annotations

import polars as pl

from catalogs.tables.catalog import Catalog

ASIDE = {"run_id", "finished_at", "started_at"}


def contents(catalog: Catalog) -> dict[str, pl.DataFrame]:
    """The rows that count, in a fixed order."""
    frames = {
        "videos": catalog.scan("videos").sort("video_id"),
        "clips": catalog.finished_clips().sort("clip_id"),
        "decisions": catalog.scan("decisions").sort("clip_id"),
    }
    return {
        name: frame.drop([c for c in frame.collect_schema().names() if c in ASIDE]).collect()
        for name, frame in frames.items()
    }


def differences(a: Catalog, b: Catalog) -> list[str]:
    """What differs between two catalogs, one line each; float scores may differ in the last bits."""
    found = []
    left, right = contents(a), contents(b)
    for name in left:
        if left[name].height != right[name].height:
            found.append(f"{name}: {left[name].height} rows against {right[name].height}")
            continue
        for column in left[name].columns:
            x, y = left[name][column], right[name][column]
            if x.dtype.is_float():
                same = ((x - y).abs() <= 1e-5 * (1 + x.abs())).fill_null(False) | (x.is_null() & y.is_null())
                equal = bool(same.all())
            else:
                equal = x.to_list() == y.to_list()
            if not equal:
                found.append(f"{name}.{column}: {[(p, q) for p, q in zip(x.to_list(), y.to_list()) if p != q][:2]}")
    stray = a.scan("clips").collect().height - left["clips"].height
    if stray:
        found.append(f"{stray} rows of clips that count for nothing")
    return found


SCORES = (
    "motion",
    "motion_vmaf",
    "jitter",
    "blur",
    "brightness",
    "contrast",
    "saturation",
    "interlaced",
    "ocr_area",
    "ocr_boxes",
    "crop_x",
    "crop_y",
    "crop_width",
    "crop_height",
)


def assert_same_scores(before: pl.DataFrame, after: pl.DataFrame) -> int:
    """Every score of clips in the same order agrees to 1e-3, relative above 1, hashes bit by bit; gives how many scores
    were compared."""
    for column in ("clip_id", "camera_motion", "phash", "content_hash"):
        assert before[column].to_list() == after[column].to_list(), column
    compared = 0
    for column in SCORES:
        for x, y in zip(before[column], after[column]):
            assert (x is None) == (y is None), column
            if x is not None:
                assert abs(x - y) <= 1e-3 * max(1, abs(x)), (column, x, y)
                compared += 1
    return compared
