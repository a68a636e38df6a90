"""Prompts, from wherever they come: the command line, lists, tables, benchmarks, or the captions of a catalog's
clips."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import polars as pl

from datakit.errors import CatalogError, ConfigError, MediaError
from datakit.source import check_content, present
from datakit.video.uri import is_remote, local_path
from sampler.prompts.prompt_files import rows
from sampler.prompts.references import Reference, check
from trainer.diffusion.conditioning import MODES, Given
from trainer.diffusion.prompt_format import motion_score
from trainer.planning.frame_rate import SAME_RATE, frame_rates, frames_needed

log = logging.getLogger("datakit")
SUFFIXES = (".txt", ".csv", ".jsonl", ".parquet", ".json")
VBENCH = "_full_info.json"
COLUMNS = ("text", "ref", "name", "neg", "motion", "seed", "aspect_ratio", "num_frames")
"""Of tables. The first four are those of Open-Sora 2.0 (opensora/datasets/datasets.py, its
scripts/diffusion/inference.py)."""
OF_CLIP_LISTS = ("text", "ref", "name", "neg")
"""What is read of a table with a column `path`, which lists clips: its `motion` is a measurement."""
ASPECT = r"\d+(\.\d+)?:\d+(\.\d+)?"
BETWEEN_REFERENCES = ";"
LONGEST_NAME = 200
"""Bytes: file systems allow 255, and suffixes follow."""
MOST_SEED = 2**63 - 1
NAME_DIGITS = 12
"""Of a clip_id."""
READERS = 8
"""Threads that look at references: reading is mostly waiting, decoding runs outside of Python's lock."""
FPS = 24.0
"""Open-Sora 2.0's."""
OF_CLIPS = (
    "clip_id",
    "video_id",
    "path",
    "lost_start",
    "lost_end",
    "stream",
    "start_pts",
    "end_pts",
    "num_frames",
    "fps",
    "vfr",
    "kind",
    "width",
    "height",
    "crop_x",
    "crop_y",
    "crop_width",
    "crop_height",
    "motion_vmaf",
    "caption",
)


@dataclass(frozen=True)
class Prompt:
    """What one video, or several samples of it, is made from.

    Attributes:
        text: without frame rate and motion score, see `trainer.diffusion.prompt_format`.
        name: of its files, without suffix.
        references: head first, then tail; one may serve both.
        negative, motion, seed, aspect_ratio, num_frames: None: the run's.
        source_clip: clip_id of the catalog that it came from.
        where: it stands, for messages.
    """

    text: str
    name: str | None = None
    references: tuple[Reference, ...] = ()
    negative: str | None = None
    motion: int | None = None
    seed: int | None = None
    aspect_ratio: str | None = None
    num_frames: int | None = None
    source_clip: str | None = None
    where: str = ""


def read_prompts(sources: Sequence[str], limit: int | None = None) -> list[Prompt]:
    """Prompts of files, and those that are given as they are.

    - .txt: a prompt a line; empty lines and lines that begin with # are skipped.
    - .csv, .jsonl, .parquet: columns `COLUMNS`, of which only `text` must be there. `ref` names pictures or videos,
      several with ; between them; relative ones start from the file's folder, else (as in Open-Sora's own lists) from
      the working folder. A table with a column `path` lists clips for training, as Open-Sora's and our exports do: only
      `OF_CLIP_LISTS` are read.
    - *_full_info.json: VBench's prompts.

    Args:
        limit: no more than so many, of all sources together.

    Raises:
        ConfigError: a file that is not there or of no known kind, a broken row (named), unknown columns.
    """
    if not sources:
        raise ConfigError("no prompts: give one, or a file of them (.txt, .csv, .jsonl, .parquet)")
    return list(islice(chain.from_iterable(map(_read, sources)), limit))


def prompts_of_catalog(
    root: str,
    where: str,
    mode: str,
    snapshot: str | None = None,
    limit: int | None = None,
    fps: float = FPS,
) -> list[Prompt]:
    """The captions of clips, with the motion score that training tells of them; in modes that give frames, with those
    of the clips.

    Clips without a caption, or with too few frames for the mode, are left out, and their number is logged.

    Args:
        where: SQL condition over the view `clips`.
        mode: of `trainer.diffusion.conditioning`.
        snapshot: see `catalogs.query.snapshots.resolve`; None: now.
        limit: no more than so many, by clip_id.
        fps: of the videos to make.

    Raises:
        CatalogError: no such catalog or snapshot, no clip matches, none is left.
        ConfigError: the condition cannot be read; a video is gone, or no longer what it was.
    """
    from catalogs.query.selection import Selection
    from catalogs.tables.catalog import Catalog

    selection = Selection(Catalog(root), snapshot, where, OF_CLIPS)
    usable = _usable(selection.read(), MODES[mode], fps, f"{root} where {where}")[:limit].to_dicts()
    references = _references_of(usable, selection, root) if MODES[mode] != Given() else [()] * len(usable)
    names = [c["clip_id"][:NAME_DIGITS] for c in usable]
    return [
        Prompt(
            c["caption"].strip(),
            name,
            given,
            motion=motion_score(c["motion_vmaf"]),
            source_clip=c["clip_id"],
            where=f"clip {name}",
        )
        for c, name, given in zip(usable, names, references)
    ]


def check_references(prompts: Sequence[Prompt], mode: str, fps: float = FPS) -> None:
    """Every prompt has the references that the mode takes, and they can be read: before any model is loaded.

    Args:
        mode: of `trainer.diffusion.conditioning`. t2v takes none; i2v_loop one or two, the others one.
        fps: of the videos to make. References that cannot give it evenly are logged, not refused (see
            `trainer.planning.frame_rate`).

    Raises:
        ConfigError: what is wrong with the first such prompt, and how many more there are.
    """
    wanted = {}  # in order, each once
    for prompt in prompts:
        for each in _wanted(prompt, mode):
            wanted.setdefault(each, prompt.where or repr(prompt.text))
    with ThreadPoolExecutor(READERS) as pool:
        found = list(zip(wanted, pool.map(partial(_look, fps=fps), wanted)))
    broken = [(each, error) for each, error in found if isinstance(error, MediaError)]
    if broken:
        each, error = broken[0]
        more = f" (and {len(broken) - 1} more references cannot be read)" if len(broken) > 1 else ""
        place = each.reference.uri
        raise ConfigError(f"{wanted[each]}: {'' if place in error.message else f'{place}: '}{error.message}{more}")
    rates = [(each, rate) for each, rate in found if rate and not isinstance(rate, MediaError)]
    other = [(each, rate) for each, rate in rates if abs(rate / fps - 1) > SAME_RATE]
    if other:
        each, rate = other[0]
        log.warning(
            "%d of the references do not come at %g frames/s and are taken as they are: %s at %g (%s)",
            len(other),
            fps,
            each.reference.uri,
            rate,
            wanted[each],
        )


class _Wanted(NamedTuple):
    """Frames at one end of a reference."""

    reference: Reference
    count: int
    end: bool


def _wanted(prompt: Prompt, mode: str) -> list[_Wanted]:
    """Raises:
    ConfigError: not as many references as the mode takes.
    """
    given, has = MODES[mode], len(prompt.references)
    ends = [(count, end) for count, end in ((given.head, False), (given.tail, True)) if count]
    if min(len(ends), 1) <= has <= len(ends):
        return [_Wanted(prompt.references[-1 if end else 0], count, end) for count, end in ends]
    where = prompt.where or repr(prompt.text)
    if not ends:
        raise ConfigError(f"{where}: mode t2v takes no reference: others do (--mode i2v_head)")
    what = "picture" if given.head + given.tail <= 2 else "video"
    takes = f"a {what}, or two (head;tail)" if len(ends) > 1 else f"one {what}"
    raise ConfigError(
        f"{where}: mode {mode} takes {takes}, there {'is' if has == 1 else 'are'} {has or 'none'} (--ref, or the "
        f"column ref)"
    )


def _look(wanted: _Wanted, fps: float) -> float | MediaError:
    """The rate of the frames, or why they cannot be read."""
    try:
        return check(wanted.reference, wanted.count, fps, wanted.end)
    except MediaError as e:
        return e


# Catalogs


def _usable(clips: pl.DataFrame, given: Given, fps: float, what: str) -> pl.DataFrame:
    if clips.is_empty():
        raise CatalogError(f"nothing to sample: no clip of {what} is there")
    told = clips.filter(pl.col("caption").str.strip_chars() != "")
    if told.height < clips.height:
        log.warning(
            "%d of %d clips of %s have no caption and are left out: `datakit run caption` writes them",
            clips.height - told.height,
            clips.height,
            what,
        )
    needed = max(given.head, given.tail)
    usable = told.filter(_long_enough(told, needed, fps)) if needed > 1 else told
    if usable.height < told.height:
        log.warning(
            "%d of %d clips of %s have fewer than %d frames at %g frames/s and are left out",
            told.height - usable.height,
            told.height,
            what,
            needed,
            fps,
        )
    if usable.is_empty():
        lacking = f"{needed} frames at {fps:g} frames/s" if told.height else "a caption"
        raise CatalogError(f"nothing to sample: of {told.height or clips.height} clips of {what} none has {lacking}")
    return usable


def _long_enough(clips: pl.DataFrame, frames: int, fps: float) -> pl.Series:
    """By the catalog's facts, as a plan has it."""
    timed = clips.select((pl.col("kind") != "image") & (pl.col("fps") > 0)).to_series().fill_null(False)
    native = clips["fps"].fill_null(1.0).clip(lower_bound=1e-3).to_numpy()
    needed = frames_needed(frames, *frame_rates(native, clips["vfr"].fill_null(False).to_numpy(), fps), native)
    return timed & (clips["num_frames"].fill_null(0) >= pl.Series(needed))


def _references_of(clips: Sequence[Mapping[str, Any]], selection: Any, root: str) -> list[tuple[Reference]]:
    """Each clip as training reads it: its file, if that has all of its frames, else the source; without black
    borders."""
    base = root if is_remote(root) else os.path.abspath(root)
    files = [
        f"{base}/{c['path']}" if c["path"] and not (c["lost_start"] or 0) + (c["lost_end"] or 0) else None
        for c in clips
    ]
    sources = _sources(selection, {c["video_id"] for c, file in zip(clips, files) if file is None})
    found = []
    for clip, file in zip(clips, files):
        box = tuple(clip[name] for name in ("crop_x", "crop_y", "crop_width", "crop_height"))
        crop = (0, 0, clip["width"], clip["height"]) if None in box else box
        span = (clip["start_pts"], clip["end_pts"])
        found.append(
            (
                Reference(file, crop=crop, vfr=bool(clip["vfr"]))
                if file is not None
                else Reference(sources[clip["video_id"]], span, clip["stream"], crop, bool(clip["vfr"])),
            )
        )
    return found


def _sources(selection: Any, videos: set[str]) -> dict[str, str]:
    """Where each video lies now, seen to hold what it held.

    Raises:
        ConfigError: it does not.
    """
    rows = selection.catalog.scan("videos", selection.versions.get("videos")).filter(
        pl.col("video_id").is_in(list(videos))
    )
    found = {video: present(uris) for video, uris in rows.select("video_id", "uris").collect().iter_rows()}
    for video, address in found.items():
        try:
            check_content(address["uri"], address["size"], video)
        except MediaError as e:
            raise ConfigError(f"the source of a clip cannot be its reference: {e}") from e
    return {video: address["uri"] for video, address in found.items()}


# Files


def _read(source: str) -> Iterator[Prompt]:
    """What one argument stands for."""
    if not source.strip():
        raise ConfigError("an empty prompt")
    if source.lower().endswith(SUFFIXES):
        yield from _read_file(source)
    elif os.path.isfile(source):
        raise ConfigError(
            f"{source} is a file of no known kind: prompts are read from .txt, .csv, .jsonl, .parquet and VBench's "
            f"*{VBENCH}"
        )
    elif os.sep in source and os.path.isdir(source):
        raise ConfigError(f"{source} is a folder: name the files in it")
    else:
        yield Prompt(source.strip(), where=f"prompt {source.strip()[:60]!r}")


def _read_file(path: str) -> Iterator[Prompt]:
    if not is_remote(path) and not os.path.isfile(local_path(path)):
        raise ConfigError(f"there is no file {path}")
    if path.lower().endswith(".json"):
        if not path.endswith(VBENCH):
            raise ConfigError(
                f"{path}: of .json files only VBench's (*{VBENCH}) are known; JSON lines are called .jsonl"
            )
        from sampler.prompts.vbench import vbench_prompts

        yield from (
            Prompt(text, where=f"{path} prompt {number}") for number, text in enumerate(vbench_prompts(path), start=1)
        )
        return
    empty = True
    for prompt in _prompts_of(path):
        empty = False
        yield prompt
    if empty:
        raise ConfigError(f"{path} holds no prompts")


def _prompts_of(path: str) -> Iterator[Prompt]:
    ignored: dict[str, None] = {}
    for where, columns in rows(path):
        if "path" in columns:
            new = [name for name in columns if name not in OF_CLIP_LISTS and name not in ignored]
            ignored.update(dict.fromkeys(new))
            columns = {name: columns[name] for name in OF_CLIP_LISTS if name in columns}
        yield _prompt(columns, where, path)
    if ignored:
        log.warning(
            "%s lists clips (it has a column path): their texts are the prompts; ignored: %s", path, ", ".join(ignored)
        )


# Rows


def _prompt(columns: Mapping[str, Any], where: str, path: str) -> Prompt:
    """Raises:
    ConfigError: a column that is none of ours, an empty text, values of another type.
    """
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        raise ConfigError(f"{where}: no column {unknown[0]!r} is known: there are {', '.join(COLUMNS)}")
    told = {name: value for name, value in columns.items() if not _is_empty(value)}
    if not isinstance(told.get("text"), str):
        raise ConfigError(f"{where}: {'the text is no text' if 'text' in told else 'no text'}")
    name, negative = (str(told[key]).strip() if key in told else None for key in ("name", "neg"))
    if name is not None and (name.startswith(".") or set(name) & set("/\\\0") or len(name.encode()) > LONGEST_NAME):
        raise ConfigError(f"{where}: {name[:60]!r} cannot be the name of a file")
    return Prompt(
        told["text"].strip(),
        name,
        tuple(_references(told.get("ref"), where, path)),
        negative,
        _whole(told, "motion", where),
        _whole(told, "seed", where),
        _aspect(told.get("aspect_ratio"), where),
        _whole(told, "num_frames", where),
        where=where,
    )


def _aspect(value: Any, where: str) -> str | None:
    if value is not None and not re.fullmatch(ASPECT, str(value).strip()):
        raise ConfigError(f"{where}: aspect_ratio is width to height, like 16:9 or 2.39:1, not {value!r}")
    return None if value is None else str(value).strip()


def _references(cell: Any, where: str, path: str) -> Iterator[Reference]:
    parts: Iterable[Any] = cell.split(BETWEEN_REFERENCES) if isinstance(cell, str) else cell or ()
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) and part.strip() for part in parts):
        raise ConfigError(
            f"{where}: ref is a path or URL, or several with {BETWEEN_REFERENCES} between them, not {cell!r}"
        )
    for part in parts:
        yield Reference(_address(part.strip(), path))


def _address(reference: str, path: str) -> str:
    """Where a reference of the table at `path` lies."""
    if is_remote(reference) or os.path.isabs(local_path(reference)):
        return reference
    if is_remote(path):
        return f"{path.rsplit('/', 1)[0]}/{reference}"
    beside = os.path.join(os.path.dirname(os.path.abspath(local_path(path))), local_path(reference))
    here = os.path.abspath(local_path(reference))
    return here if os.path.exists(here) and not os.path.exists(beside) else beside


def _whole(told: Mapping[str, Any], name: str, where: str) -> int | None:
    """A whole number from 0 on. Tables of numbers with gaps have 4.0 for 4."""
    value = told.get(name)
    try:
        number = None if isinstance(value, bool) or value is None else float(value) if "." in str(value) else int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if value is not None and (number is None or number != int(number) or not 0 <= number <= MOST_SEED):
        raise ConfigError(f"{where}: {name} is a whole number from 0 on, not {value!r}")
    return None if number is None else int(number)


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or _is_nan(value) or (isinstance(value, str) and not value.strip())


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
