"""What an ingest does with every source that it lists, and the counts of it; the protocol is the registry's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from catalogs.records.tombstones import Forgotten
from catalogs.records.video_registry import Video, VideoRegistry
from catalogs.tables.catalog import Catalog
from datakit.errors import MediaError
from datakit.source import Source
from pipelines.catalog_sync.embeddings import derived, embedding_identity
from pipelines.catalog_sync.score_writer import embedding_rows
from pipelines.settings import Settings
from pipelines.stages.registry import STAGES, enabled_stages, fingerprint

ADVICE = ": put the old file back, `datakit catalog relink` it, or take the new one with --retry-failed"


@dataclass(frozen=True)
class VideoTask:
    """A pending video that this run is to process."""

    video_id: str
    uri: str
    size: int
    shard: str


@dataclass
class Counts:
    """What a run did, in videos; every source it saw is in exactly one of these."""

    sources: int = 0
    same_content: int = 0  # further addresses of a video already seen in this run
    registered: int = 0  # handed to the workers
    done_before: int = 0
    quarantined_before: int = 0
    quarantined_at_once: int = 0  # unreadable, empty, changed
    ok: int = 0
    quarantined: int = 0
    done_by_another: int = 0
    forgotten: int = 0  # by `datakit catalog forget`: not registered
    clips: int = 0


class Ledger:
    """Registers and finishes the videos of one run.

    Args:
        retry_failed: whether quarantined videos are done again, and changed sources taken as new ones.
    """

    def __init__(self, catalog: Catalog, run_id: str, settings: Settings, retry_failed: bool = False):
        self.counts = Counts()
        self.seen: set[str] = set()
        self._catalog, self._run_id, self._retry_failed = catalog, run_id, retry_failed
        self._fingerprint = fingerprint("shots", settings)
        names = [name for name in enabled_stages(settings) if name not in derived(STAGES)]
        self._stage_versions = [{"stage": name, "fingerprint": fingerprint(name, settings)} for name in names]
        self._embedding = embedding_identity(settings) if "embed" in names else ("", "", "")
        self._registry = VideoRegistry(
            catalog,
            run_id,
            step="scan",
            fingerprint=self._fingerprint,
            take_changed=retry_failed,
            advice=ADVICE,
            readers=settings.runner.scan_threads,
            holdout=(settings.catalog.val, settings.catalog.test),
        )

    def register(self, wave: Sequence[Source]) -> list[VideoTask]:
        """Enter a wave of sources; gives the videos to process."""
        self.counts.sources += len(wave)
        found: dict[str, list[Source]] = {}
        problems: dict[str, MediaError] = {}
        for source, (identity, problem) in zip(wave, self._registry.identify(wave), strict=True):
            if identity in self.seen or identity in found:
                self.counts.same_content += 1
            found.setdefault(identity, []).append(source)
            if problem is not None:
                problems.setdefault(identity, problem)
        self._leave_out_forgotten(found)
        self._registry.register(
            [
                Video(identity, sources, attributes=_attributes(sources), failure=problems.get(identity))
                for identity, sources in found.items()
            ]
        )
        if self._retry_failed:
            self._registry.move_addresses({s.uri: identity for identity, sources in found.items() for s in sources})
        return self._choose(found, problems)

    def finish(self, videos: Sequence[Video]) -> None:
        """Commit what came back from the workers: clips as the stages made them, embeddings in them."""
        for video in videos:
            video.clips = [{**c, "run_id": self._run_id, "stage_versions": self._stage_versions} for c in video.clips]
            video.embeddings = embedding_rows(video.clips, *self._embedding)
        finished = self._registry.finish(videos)
        for video in videos:
            if video.video_id not in finished:
                self.counts.done_by_another += 1
            elif video.failure is None:
                self.counts.ok += 1
                self.counts.clips += finished[video.video_id]
            else:
                self.counts.quarantined += 1

    def sweep(self) -> int:
        """Delete clips that can never count, and their embeddings; how many clips."""
        return self._registry.sweep()

    def _leave_out_forgotten(self, found: dict[str, list[Source]]) -> None:
        """What was forgotten does not come back."""
        for identity in Forgotten.read(self._catalog).videos & set(found):
            del found[identity]
            if identity not in self.seen:
                self.seen.add(identity)
                self.counts.forgotten += 1

    def _choose(self, found: dict[str, list[Source]], problems: dict[str, MediaError]) -> list[VideoTask]:
        new = {identity: sources for identity, sources in found.items() if identity not in self.seen}
        self.seen.update(new)
        chosen, again = [], []
        for video_id, state in self._registry.states(new).items():
            if state.status == "quarantined" and state.run_id == self._run_id:
                self.counts.quarantined_at_once += 1
            elif state.status == "quarantined" and (video_id in problems or not self._retry_failed):
                self.counts.quarantined_before += 1
            elif state.status == "ok" and state.fingerprint == self._fingerprint:
                self.counts.done_before += 1
            else:
                chosen.append(video_id)
                if state.status != "pending":
                    again.append(video_id)
        self._registry.reopen(again)
        self.counts.registered += len(chosen)
        first = {identity: sources[0] for identity, sources in new.items()}
        return [VideoTask(i, first[i].uri, first[i].size or 0, self._catalog.shard_of(i)) for i in chosen]


def _attributes(sources: Sequence[Source]) -> dict[str, object]:
    """What the list said; of the same content listed more than once, the first says it."""
    return {name: value for source in reversed(sources) for name, value in source.attributes.items()}
