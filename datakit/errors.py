"""The errors a user meets, and the kinds that quarantine rows carry."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum


class ErrorKind(StrEnum):
    """Why a video or a clip could not be processed; the value stored in `error_kind`."""

    UNREADABLE = "unreadable"  # missing, no permission, network error
    EMPTY = "empty"  # zero bytes
    NOT_MEDIA = "not_media"  # no demuxer recognises the bytes
    NO_VIDEO = "no_video"  # audio only, cover art only, data only
    UNSUPPORTED = "unsupported"  # a codec or pixel format this build cannot decode
    DECODE = "decode"  # damaged packets inside the stream
    TRUNCATED = "truncated"  # the file ends before its header says it should
    SOURCE_CHANGED = "source_changed"  # a known URI now holds other content
    TIMEOUT = "timeout"  # no progress within the deadline
    CRASH = "crash"  # the worker process died
    OUT_OF_MEMORY = "out_of_memory"  # the worker process hit its memory limit
    STAGE = "stage"  # a stage raised an exception
    ENCODE = "encode"  # writing a clip file failed


class DatakitError(Exception):
    """Base of every error meant for the user: one clear sentence, no traceback needed."""


class ConfigError(DatakitError):
    """An option, a config key or a recipe that makes no sense."""


class CatalogError(DatakitError):
    """A catalog that is missing, broken or does not hold what was asked for."""


class MissingDependency(DatakitError):
    """A library or model that an optional feature needs, with the way to bring it."""


class DownloadError(DatakitError):
    """Weights that could not be downloaded: why, and what to do."""


class MediaError(DatakitError):
    """A source that cannot be processed: becomes a quarantine row, never ends a run."""

    def __init__(self, kind: ErrorKind, message: str, stage: str = "decode"):
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.stage = stage

    def __reduce__(self):  # crosses process boundaries
        return MediaError, (self.kind, self.message, self.stage)


def either(names: Sequence[str]) -> str:
    """What there is to choose from, in words: a, b or c."""
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else "".join(names)
