"""WebDataset: tar shards in which files of one name, up to its first dot, are one sample.

The format: github.com/webdataset/webdataset, `tariterators.base_plus_ext` and `group_by_keys`. Ours hold KEY.mp4,
KEY.txt (the caption, empty where there is none) and KEY.json (everything else); KEY is the clip_id.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO

import polars as pl

from catalogs.interop.exchange.column_mapping import plain
from catalogs.interop.exchange.export_job import SUMMARY, Job
from catalogs.interop.exchange.source_row import Row
from catalogs.interop.media.clip_files import File
from datakit.atomic import atomic_path
from datakit.errors import ConfigError, ErrorKind, MediaError
from datakit.hashing import hash_hex
from datakit.video.uri import IMAGE_SUFFIXES, VIDEO_SUFFIXES, open_bytes

SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
TEXTS = ("txt", "text", "caption")
UNITS = {"MB": 10**6, "GB": 10**9}
BLOCK = 1 << 20


def write(job: Job) -> int:
    """Shards shard-000000.tar …, filled in order while clips are cut."""
    most_bytes, most_clips = shard_limit(job.request.shard_size)
    columns = list(job.request.columns or job.selection.catalog.view_columns())
    rows = job.rows_with_media([*columns, "clip_id", "caption"])
    told = [
        name
        for name in dict.fromkeys(["clip_id", *columns])
        if name not in ("caption", "path", "lost_start", "lost_end")
    ]
    shards = _Shards(job.place.folder, most_bytes, most_clips)
    written = 0
    try:
        for number, file in job.files(rows, job.stem(rows)):
            shards.add(rows["clip_id"][number], file, rows["caption"][number], _facts(rows, number, told, file))
            if file.made:
                os.unlink(file.path)
            written += 1
    finally:
        shards.close()
    shutil.rmtree(job.place.clips, ignore_errors=True)
    job.notes["shards"] = shards.written
    return written


def shard_limit(text: str) -> tuple[int | None, int | None]:
    """Bytes, clips: "500MB", "1GB", or "1000".

    Raises:
        ConfigError: something else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB)?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) <= 0 or (not found[2] and not found[1].isdigit()):
        raise ConfigError(f"--shard-size is bytes as 500MB or 1GB, or a number of clips, not {text!r}")
    return (int(float(found[1]) * UNITS[found[2].upper()]), None) if found[2] else (None, int(found[1]))


def shards_of(src: str) -> list[str]:
    """Paths of shards: of a folder, a file, or a pattern with `{000..012}`, `{a,b}`, `*`.

    Raises:
        ConfigError: none there.
    """
    if os.path.isdir(src):
        found = sorted(str(path) for path in Path(src).rglob("*") if is_shard(path.name))
    else:
        found = [path for part in braces(src) for path in (sorted(glob.glob(part)) if glob.has_magic(part) else [part])]
    missing = [path for path in found if not os.path.isfile(path)]
    if missing or not found:
        raise ConfigError(f"no such shard: {missing[0] if missing else src}")
    return [os.path.abspath(path) for path in found]


def is_shard(name: str) -> bool:
    return name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def braces(pattern: str) -> list[str]:
    """Bash's braces, as WebDataset expands them: `{000..012}` and `{a,b}`."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if bounds:
        low, high = bounds.groups()
        parts = [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    else:
        parts = found[1].split(",")
    return [whole for part in parts for whole in braces(before + part + after)]


def read(src: str, extract_to: str) -> Iterator[Row]:
    """Samples of all shards; their videos are extracted to a folder for each shard below `extract_to`, once. What is in
    a shard that cannot be read on, or must not be extracted, is a row with a problem."""
    for shard, folder in zip(shards := shards_of(src), _folders(shards, extract_to)):
        yield from _read_shard(shard, folder)


def count(src: str) -> int:
    """Samples with a video or a picture, as far as shards can be read."""
    return sum(1 for shard in shards_of(src) for _ in _names(shard))


def _names(shard: str) -> Iterator[str]:
    try:
        with tarfile.open(shard, "r|*") as tar:
            for member in tar:
                if _is_media(member.name):
                    yield member.name
    except (tarfile.TarError, OSError, EOFError, ValueError):
        return


@dataclass
class _Sample:
    key: str
    videos: list[tuple[str, MediaError | None]] = field(default_factory=list)
    text: str | None = None
    columns: dict = field(default_factory=dict)


def _read_shard(shard: str, folder: Path) -> Iterator[Row]:
    ours = os.path.exists(os.path.join(os.path.dirname(shard), SUMMARY))
    sample: _Sample | None = None
    try:
        with tarfile.open(shard, "r|*") as tar:
            for member in tar:
                key, suffix = _split(member.name)
                if key is None or member.isdir():
                    continue
                if sample is None or sample.key != key:
                    yield from _rows(sample, shard, ours)
                    sample = _Sample(key)
                _take(sample, suffix, tar, member, folder, shard)
            _check_end(shard, tar.offset)
    except (tarfile.TarError, OSError, EOFError, ValueError) as e:
        yield from _rows(sample, shard, ours)
        sample = None
        yield Row(shard, shard, problem=MediaError(ErrorKind.TRUNCATED, f"the shard {shard} cannot be read on: {e}"))
    yield from _rows(sample, shard, ours)


def _rows(sample: _Sample | None, shard: str, ours: bool) -> Iterator[Row]:
    if sample is None:
        return
    for path, problem in sample.videos:
        columns = (
            {"key": sample.key, "shard": os.path.basename(shard), **sample.columns} if not ours else sample.columns
        )
        yield Row(path, f"{shard}, {sample.key}", sample.text, columns, ours, problem)


def _take(
    sample: _Sample, suffix: str, tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, shard: str
) -> None:
    """A file of a sample. Others than videos, pictures, texts and JSON are named in the sample's columns."""
    if _is_media(member.name):
        sample.videos.append(_extract(tar, member, folder, shard))
    elif suffix.rsplit(".", 1)[-1] in TEXTS and member.isfile():
        sample.text = _file_in(tar, member).read().decode("utf-8", "replace") or None
    elif suffix.rsplit(".", 1)[-1] == "json" and member.isfile():
        content = _file_in(tar, member).read()
        try:
            found = json.loads(content)
        except ValueError:
            found = content.decode("utf-8", "replace")
        sample.columns.update(found if isinstance(found, dict) else {"json": found})
    else:
        sample.columns[suffix] = f"{shard}::{member.name}"


def _file_in(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    assert content is not None, f"{member.name} is no file"
    return content


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, shard: str) -> tuple[str, MediaError | None]:
    parts = [part for part in member.name.replace("\\", "/").split("/") if part not in ("", ".")]
    named = f"{shard}::{member.name}"
    if not member.isfile():
        return named, MediaError(ErrorKind.UNREADABLE, f"{member.name} in {shard} is a link or a device, not a file")
    if ".." in parts or member.name.startswith("/") or not parts:
        return named, MediaError(
            ErrorKind.UNREADABLE, f"{member.name} in {shard} leads out of the folder it would be extracted to"
        )
    target = folder.joinpath(*parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as part:
        with open(part, "wb") as file:
            shutil.copyfileobj(_file_in(tar, member), file, BLOCK)
        if target.exists() and _same(target, part):  # extracted before: its modification time stays
            part.unlink()
    return str(target), None


def _check_end(shard: str, offset: int) -> None:
    """tarfile takes a header that is cut off for the end.

    Raises:
        ReadError: the file ends before its archive does.
    """
    if not shard.lower().endswith(".tar"):
        return  # a compressed stream knows its length
    with open(shard, "rb") as file:
        file.seek(offset)
        rest = file.read(tarfile.BLOCKSIZE)
    if os.path.getsize(shard) < offset or 0 < len(rest) < tarfile.BLOCKSIZE or any(rest):
        raise tarfile.ReadError("unexpected end of data")


def _same(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    with open(one, "rb") as a, open(other, "rb") as b:
        return all(x == y for x, y in iter(lambda: (a.read(BLOCK), b.read(BLOCK)), (b"", b"")))


def _folders(shards: list[str], extract_to: str) -> list[Path]:
    """A folder for each shard; those of one name in several folders get a mark of where they lie."""
    stems = [os.path.basename(path).split(".")[0] for path in shards]
    often = Counter(stems)
    marks = [f"-{hash_hex(path, 4)}" for path in shards]
    return [
        Path(os.path.abspath(extract_to), stem + (mark if often[stem] > 1 else "")) for stem, mark in zip(stems, marks)
    ]


def _split(name: str) -> tuple[str | None, str]:
    """Key and suffix: the suffix begins at the first dot of the last part of the name."""
    found = re.fullmatch(r"((?:.*/)?[^/.]+)\.([^/]*)", name)
    return (found[1], found[2].lower()) if found else (None, "")


def _is_media(name: str) -> bool:
    return "." + name.rsplit(".", 1)[-1].lower() in SUFFIXES and _split(name)[0] is not None


def _facts(rows: pl.DataFrame, number: int, columns: list[str], file: File) -> dict:
    row = rows.select(columns).row(number, named=True)
    size = {
        "num_frames": file.frames,
        "width": file.width,
        "height": file.height,
        "aspect_ratio": file.height / file.width,
        "resolution": file.height * file.width,
    }
    return plain({name: size.get(name, value) for name, value in row.items()})


class _Shards:
    """Tar files that are filled one after the other."""

    def __init__(self, folder: Path, most_bytes: int | None, most_clips: int | None):
        self._folder, self._most_bytes, self._most_clips = folder, most_bytes, most_clips
        self._numbers = itertools.count()
        self._tar: tarfile.TarFile | None = None
        self.written: list[dict] = []

    def add(self, key: str, file: File, text: str | None, facts: dict) -> None:
        suffix = os.path.splitext(file.path)[1].lower()
        with open_bytes(file.path) as source:
            size = source.seek(0, io.SEEK_END)
            source.seek(0)
            self._open_for(size)
            self._put(f"{key}{suffix}", source, size)
        for name, content in ((f"{key}.txt", text or ""), (f"{key}.json", json.dumps(facts, ensure_ascii=False))):
            data = content.encode()
            self._put(name, io.BytesIO(data), len(data))
        self.written[-1]["clips"] += 1

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def _open_for(self, size: int) -> None:
        full = (
            self._tar is not None
            and self.written[-1]["clips"]
            and (
                (self._most_bytes is not None and self.written[-1]["bytes"] + size > self._most_bytes)
                or (self._most_clips is not None and self.written[-1]["clips"] >= self._most_clips)
            )
        )
        if full:
            self.close()
        if self._tar is None:
            name = f"shard-{next(self._numbers):06d}.tar"
            self._tar = tarfile.open(self._folder / name, "w")  # noqa: SIM115 - open until the shard is full
            self.written.append({"name": name, "clips": 0, "bytes": 0})

    def _put(self, name: str, source: BinaryIO, size: int) -> None:
        """Without times and owners: equal exports are equal files."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        assert self._tar is not None, "_open_for comes first"
        self._tar.addfile(info, source)
        self.written[-1]["bytes"] += size
