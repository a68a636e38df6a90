"""VBench (Huang et al. 2024, arXiv:2311.17982): its lists of prompts, and the folder of videos that its evaluation
reads."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from datakit.errors import CatalogError, ConfigError
from sampler.video_files import FORMATS

LONGEST_NAME = 255
"""Bytes of a file name that common file systems take."""
SUFFIX = FORMATS["mp4"].suffix
"""Of the files that it reads."""
LISTED = 3


def vbench_prompts(path: str | Path, dimension: str | None = None) -> list[str]:
    """Prompts of a list, each once, in order.

    Args:
        path: a text file with a prompt on each line (`all_dimension.txt`, those in `prompts_per_dimension/`), or
            `VBench_full_info.json`.
        dimension: only those that judge it; takes the JSON file.

    Raises:
        ConfigError: no such file, not in one of these forms, or nobody judges that dimension.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read {path}: {getattr(e, 'strerror', None) or 'it is no text'}") from e
    if path.suffix.lower() == ".json":
        prompts = _of_json(path, text, dimension)
    elif dimension is not None:
        raise ConfigError(f"{path} does not say which prompt judges {dimension}: give VBench_full_info.json")
    else:
        prompts = [line.strip() for line in text.splitlines()]
    found = list(dict.fromkeys(prompt for prompt in prompts if prompt))
    if not found:
        raise ConfigError(f"{path} holds no prompts")
    return found


def export_vbench(samples: str, out: str | Path) -> int:
    """Lay out a result catalog's samples as VBench's evaluation expects them: `PROMPT-INDEX.mp4` in one folder, indices
    from 0 by seed and number (its protocol takes five of each prompt; for temporal flickering 25, of which it chooses
    five). Files are hard links, or copies on another file system.

    Returns:
        files written.

    Raises:
        ConfigError: the folder is not empty; prompts that cannot be file names, all named; samples of several
            checkpoints or in another form than mp4. Nothing is written then.
        CatalogError: no catalog, no finished samples, or a file of one is gone.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} is there and not an empty folder: VBench takes every file in it for a video of its list"
        )
    files = dict(_layout(samples))
    _check(list(files))
    lost = [source for source in files.values() if not os.path.isfile(source)]
    if lost:
        raise CatalogError(f"{len(lost)} of {len(files)} samples have no file any more (first: {lost[0]})")
    out.mkdir(parents=True, exist_ok=True)
    for name, source in files.items():
        _place(source, out / name)
    return len(files)


def _layout(samples: str) -> Iterator[tuple[str, str]]:
    """File name and source of every sample."""
    from sampler.evaluate.result_sets import file_of, read_sets

    sets = read_sets([samples])
    if len(sets) > 1:
        names = ", ".join(s.label for s in sets)
        raise ConfigError(f"{samples} has samples of {len(sets)} checkpoints ({names}): VBench judges one at a time")
    rows = sets[0].rows
    other = [row["path"] for row in rows.iter_rows(named=True) if not (row["path"] or "").lower().endswith(SUFFIX)]
    if other:
        raise ConfigError(
            f"VBench reads mp4, and {len(other)} samples are not (first: {other[0]}): sample with --set "
            f"output.format=mp4"
        )
    seen: dict[str, int] = defaultdict(int)
    for row in rows.iter_rows(named=True):
        yield f"{row['prompt']}-{seen[row['prompt']]}{SUFFIX}", file_of(sets[0].root, row)
        seen[row["prompt"]] += 1


def _of_json(path: Path, text: str, dimension: str | None) -> list[str]:
    try:
        entries = json.loads(text)
        listed = [(entry["prompt_en"].strip(), entry.get("dimension") or []) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ConfigError(f"{path} is no list of VBench: objects with prompt_en and dimension were expected") from e
    if dimension is None:
        return [prompt for prompt, _ in listed]
    known = sorted({name for _, dimensions in listed for name in dimensions})
    if dimension not in known:
        raise ConfigError(f"{path} has no dimension {dimension!r}: there are {', '.join(known)}")
    return [prompt for prompt, dimensions in listed if dimension in dimensions]


def _check(names: list[str]) -> None:
    """Raises:
    ConfigError: names that no file can have.
    """
    why = {
        "with a slash": lambda name: "/" in name or "\0" in name or "\n" in name,
        f"longer than {LONGEST_NAME} bytes": lambda name: len(name.encode()) > LONGEST_NAME,
        "empty": lambda name: name.startswith("-") and name[1:].removesuffix(SUFFIX).isdigit(),
    }
    told = []
    for what, wrong in why.items():
        bad = sorted({name.rsplit("-", 1)[0] for name in names if wrong(name)})
        if bad:
            shown = "; ".join(repr(prompt[:60] + ("…" if len(prompt) > 60 else "")) for prompt in bad[:LISTED])
            told.append(f"{len(bad)} {what} ({shown}{'; …' if len(bad) > LISTED else ''})")
    if told:
        raise ConfigError(f"prompts that cannot be file names, as VBench wants them: {', '.join(told)}")


def _place(source: str, target: Path) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
