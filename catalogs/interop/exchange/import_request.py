"""What an import is asked to do, and what became of its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from datakit.errors import MediaError


@dataclass(frozen=True)
class Request:
    """The arguments of `catalogs.interop.import_dataset`."""

    src: str
    root: str
    form: str
    media_root: str | None
    extract_to: str | None
    style: str
    limit: int | None
    workers: int | None
    on_progress: Callable[[int, int], None]


@dataclass
class Imported:
    """What became of the rows: each is in exactly one of `entered`, `in_catalog`, `divided_otherwise`, `same_content`,
    `forgotten` and `quarantined`.

    Attributes:
        in_catalog: the clip was there; a changed caption is updated.
        divided_otherwise: the catalog has the video with other clips, which stay; captions go to
            `videos.source_caption`.
        same_content: another row of this import has the same file.
        forgotten: by `datakit catalog forget`: it does not come back.
        quarantined: rows whose file cannot be used; `kinds` counts why.
        discrepancies: rows that state other frames, sizes or rates than the file has; kept in `videos.extra`, key
            `stated`.
        captions: with a text, entered or changed.
    """

    form: str = ""
    rows: int = 0
    entered: int = 0
    in_catalog: int = 0
    divided_otherwise: int = 0
    same_content: int = 0
    forgotten: int = 0
    quarantined: int = 0
    discrepancies: int = 0
    captions: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    first_problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        return asdict(self)

    def quarantine(self, where: str, problem: MediaError | None, rows: int = 1) -> None:
        self.quarantined += rows
        kind = str(problem.kind) if problem else "before"
        self.kinds[kind] = self.kinds.get(kind, 0) + rows
        if problem is not None and len(self.first_problems) < 5:
            self.first_problems.append(f"{where}: {problem.message}")
