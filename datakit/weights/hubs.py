"""Where weights come from: what a source holds of a model (`list_files`), and its bytes from any position (`open_at`).

Hugging Face is asked through huggingface_hub (its HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE hold); ModelScope through
its HTTP API (MODELSCOPE_API_TOKEN, MODELSCOPE_ENDPOINT), as its client modelscope-hub 0.5 uses it. fsspec would need
aiohttp, which the base installation does without.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import http.client
import importlib.util
import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from email.message import Message
from http.client import HTTPMessage
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote, urlencode, urlsplit

from datakit.dependencies import install_command
from datakit.errors import DownloadError, MissingDependency
from datakit.weights.registry import ModelInfo, is_whole, visible_files

HUBS = ("huggingface", "modelscope")
MODELSCOPE = "https://modelscope.cn"
TIMEOUT_S = 30.0
"""Seconds without a byte after which a connection is given up."""
CHUNK = 1 << 20
TRANSIENT = {408, 429, 500, 502, 503, 504}
HUGGING_FACE = "Hugging Face"


class Unreachable(DownloadError):
    """The source does not answer, or not now: another try may help."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a source: `path` in the model's folder, `size` in bytes and `sha256` where the source says them,
    `address` a URL or a local file, `place` the source's name in messages, `headers` for its own host only."""

    path: str
    size: int | None
    sha256: str | None
    address: str | Path
    place: str
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Listing:
    """What there is to fetch of a model. `asked` is the revision as it was asked for, `revision` what that means."""

    source: str
    asked: str | None
    revision: str | None
    files: tuple[RemoteFile, ...]

    @property
    def bytes(self) -> int | None:
        sizes = [file.size for file in self.files if file.size is not None]
        return sum(sizes) if len(sizes) == len(self.files) else None


def list_files(info: ModelInfo, source: str, revision: str | None = None) -> Listing:
    """What `source` (huggingface, modelscope, or a folder) holds of a model, only the files that it needs.

    Raises:
        Unreachable: the source does not answer.
        DownloadError: it has no such model or revision, or does not let us have it.
        MissingDependency: huggingface_hub is not installed.
    """
    if source not in HUBS:
        listing = _in_folder(info, Path(source).expanduser(), revision)
    elif info.url:
        listing = _plain(info)
    elif info.repo is None:
        raise DownloadError(f"{info.name} is nowhere to download from")
    else:
        listing = (_hugging_face if source == "huggingface" else _modelscope)(info, revision)
    return replace(listing, files=_needed(info, listing))


def _needed(info: ModelInfo, listing: Listing) -> tuple[RemoteFile, ...]:
    files = {file.path: file for file in listing.files if not file.path.startswith("/") and not _hidden(file.path)}
    if info.single:
        chosen = [files[name] for name in info.files if name in files][:1]
    else:
        patterns = info.files or ("*",)
        chosen = [
            file for path, file in files.items() if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
        ]
    if not chosen:
        raise DownloadError(f"{info.name}: {listing.source} holds none of {', '.join(info.files) or 'its files'}")
    return tuple(chosen)


def _hidden(path: str) -> bool:
    """Also `..`, so that no listing writes elsewhere."""
    return any(part.startswith(".") for part in PurePosixPath(path).parts)


def _hugging_face(info: ModelInfo, revision: str | None) -> Listing:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingDependency(
            f"downloading {info.name} from Hugging Face needs huggingface_hub: {install_command('models')} "
            "(--from modelscope and --from FOLDER do without)"
        )
    from huggingface_hub import HfApi, get_token, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        assert info.repo is not None, "models without one are plain files"
        found = api.model_info(info.repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
    except HfHubHTTPError as e:
        raise _refusal(HUGGING_FACE, info, e.response.status_code, e.response.headers, revision) from e
    except (
        Exception
    ) as e:  # no connection, offline mode: the exceptions are those of its HTTP library, which changes with its version
        raise _unreachable(HUGGING_FACE, e) from e
    token = get_token()
    headers = (("Authorization", f"Bearer {token}"),) if token else ()
    files = tuple(
        RemoteFile(
            s.rfilename,
            s.size,
            s.lfs.sha256 if s.lfs else None,
            hf_hub_url(found.id, s.rfilename, revision=found.sha, endpoint=api.endpoint),
            HUGGING_FACE,
            headers,
        )
        for s in found.siblings or ()
    )
    return Listing(HUGGING_FACE, revision, found.sha, files)


def _modelscope(info: ModelInfo, revision: str | None) -> Listing:
    """GET /api/v1/models/ORG/NAME/repo/files, and /repo?FilePath= for a file; `master` is the main branch there."""
    place, wanted = "ModelScope", revision or "master"
    base = (
        f"{os.environ.get('MODELSCOPE_ENDPOINT', MODELSCOPE).rstrip('/')}/api/v1/models/"
        f"{info.modelscope or info.repo}/repo"
    )
    token = os.environ.get("MODELSCOPE_API_TOKEN")
    headers = (("Authorization", f"Bearer {token}"), ("Cookie", f"m_session_id={token}")) if token else ()
    listing = RemoteFile(
        "", None, None, f"{base}/files?{urlencode({'Revision': wanted, 'Recursive': 'True'})}", place, headers
    )
    with open_at(listing, 0, info, revision) as (read, _):
        content = b"".join(iter(read, b""))
    try:
        entries = json.loads(content)["Data"]["Files"] or ()
    except (ValueError, TypeError, KeyError) as e:
        raise Unreachable(f"{place} gives no list of files of {info.name}, but {content[:80]!r}") from e
    files = tuple(
        RemoteFile(
            e["Path"],
            e["Size"],
            e.get("Sha256") or None,
            f"{base}?{urlencode({'Revision': wanted, 'FilePath': e['Path']})}",
            place,
            headers,
        )
        for e in entries
        if e.get("Type") != "tree"
    )
    return Listing(place, revision, wanted, files)


def _plain(info: ModelInfo) -> Listing:
    assert info.url is not None  # of plain files the table knows the address
    host = urlsplit(info.url).netloc
    request = RemoteFile(unquote(PurePosixPath(urlsplit(info.url).path).name), None, None, info.url, host)
    with _answer(request, info, method="HEAD") as response:
        size = response.headers.get("Content-Length")
    return Listing(host, None, None, (replace(request, size=int(size) if size else None),))


def _in_folder(info: ModelInfo, root: Path, revision: str | None) -> Listing:
    """A mirror: ROOT/ORG/NAME, as `models download` lays it; Hugging Face's cache; for a single file ROOT itself."""
    if not root.is_dir():
        raise DownloadError(f"--from takes huggingface, modelscope or a folder, and there is no folder {root}")
    ids = list(dict.fromkeys(name for name in (info.name, info.repo, info.modelscope) if name))
    snapshots = [hub / f"models--{name.replace('/', '--')}" for hub in (root, root / "hub") for name in ids]
    places = [_snapshot(cache, revision or "main") for cache in snapshots]
    if revision is None:
        places = [root / name for name in ids] + places + ([root] if info.single else [])
    place = next((place for place in places if place and is_whole(place, info)), None)
    if place is None:
        at = f" at revision {revision} (only Hugging Face's cache has revisions)" if revision else ""
        raise DownloadError(
            f"{root} does not hold the whole of {info.name}{at}: looked for {', '.join(ids)} and for Hugging Face's "
            f"cache"
        )
    files = [
        RemoteFile(f.relative_to(place).as_posix(), f.stat().st_size, None, f, str(root)) for f in visible_files(place)
    ]
    return Listing(str(root), revision, place.name if place.parent.name == "snapshots" else None, tuple(files))


def _snapshot(cache: Path, revision: str) -> Path | None:
    ref = cache / "refs" / revision
    snapshot = cache / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
    return snapshot if snapshot.is_dir() else None


@contextlib.contextmanager
def open_at(
    file: RemoteFile, offset: int, info: ModelInfo, revision: str | None = None
) -> Generator[tuple[Callable[[], bytes], int]]:
    """Open a file at a position. Gives a function that returns the next bytes (b"" at the end), and where they
    start: at 0 when the source cannot start elsewhere.

    Raises:
        Unreachable, DownloadError: also from the function that is given.
    """
    if isinstance(file.address, Path):
        with file.address.open("rb") as stream:
            stream.seek(offset)
            yield functools.partial(stream.read, CHUNK), offset
        return
    with _answer(file, info, revision, offset=offset) as response:

        def read() -> bytes:
            try:
                return response.read1(CHUNK)
            except (OSError, http.client.HTTPException) as e:
                raise _unreachable(file.place, e) from e

        yield read, offset if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0


def _answer(
    file: RemoteFile, info: ModelInfo, revision: str | None = None, *, offset: int = 0, method: str = "GET"
) -> http.client.HTTPResponse:
    request = urllib.request.Request(str(file.address), headers=dict(file.headers), method=method)
    request.add_header("User-Agent", "datakit")
    if offset:
        request.add_header("Range", f"bytes={offset}-")
    try:
        return _opener().open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as e:
        if e.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and offset:
            return _answer(file, info, revision, method=method)
        raise _refusal(file.place, info, e.code, e.headers, revision, file.path) from e
    except (OSError, http.client.HTTPException) as e:
        raise _unreachable(file.place, e) from e


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Credentials are for their own host: the store that it redirects to refuses them, and must not see them."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and urlsplit(following.full_url).netloc != urlsplit(req.full_url).netloc:
            following.remove_header("Authorization")
            following.remove_header("Cookie")
        return following


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    context = ssl.create_default_context()
    with contextlib.suppress(ImportError):  # machines without certificates of their own
        import certifi

        context.load_verify_locations(certifi.where())
    return urllib.request.build_opener(_Redirects, urllib.request.HTTPSHandler(context=context))


def _refusal(
    place: str,
    info: ModelInfo,
    status: int,
    headers: Mapping[str, str] | Message,
    revision: str | None = None,
    file: str = "",
) -> DownloadError:
    """What the status of an answer means for the user."""
    what = (info.modelscope or info.repo if place == "ModelScope" else info.repo) or info.name
    code, message = headers.get("X-Error-Code", ""), headers.get("X-Error-Message", "")
    token = {HUGGING_FACE: "HF_TOKEN", "ModelScope": "MODELSCOPE_API_TOKEN"}.get(place)
    if status in TRANSIENT:
        return Unreachable(f"{place} answers {status} for {what}: try again later, or another --from")
    if token is None:
        return DownloadError(f"{place} answers {status} for {info.url}")
    if "Invalid credentials" in message:
        return DownloadError(f"{place} does not know the token in {token} ({status}): take it away, or make a new one")
    if code == "GatedRepo" or status == 403:
        return DownloadError(
            f"{what} is gated ({status}): accept its licence on its page at {place}, then set {token} to a token of "
            f"that account"
        )
    if code == "RevisionNotFound" or (status == 404 and revision and code != "RepoNotFound"):
        return DownloadError(f"{place} has no revision {revision!r} of {what} ({status})")
    if status in (401, 404) and file:
        return DownloadError(f"{place} does not give {file} of {what} ({status})")
    if status in (401, 404):
        return DownloadError(f"{place} has no model {what} ({status}), or it is private: then set {token}")
    return DownloadError(f"{place} answers {status} for {what}")


def _unreachable(place: str, error: Exception) -> Unreachable:
    reason = " ".join(str(getattr(error, "reason", None) or error).split())
    endpoint = {HUGGING_FACE: " or HF_ENDPOINT", "ModelScope": " or MODELSCOPE_ENDPOINT"}.get(place, "")
    other = "" if place == "ModelScope" else "--from modelscope, "
    return Unreachable(
        f"{place} cannot be reached ({reason}): check the network{endpoint}, or take another source: {other}--from "
        f"FOLDER"
    )
