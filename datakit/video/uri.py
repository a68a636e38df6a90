"""Addresses of sources: local paths and fsspec URLs. Light to import: the driver lists with it."""

from __future__ import annotations

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .m2v .mts .m2ts .ts .vob .flv .f4v .wmv .asf .ogv .ogg .3gp .3g2 "
    ".mxf .y4m .dv .rm .rmvb .gif .h264 .264 .h265 .265 .hevc .av1 .ivf .obu".split()
)
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .png .webp .bmp .tif .tiff .avif .heic .jxl .ppm .pgm".split())


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def local_path(uri: str) -> str:
    """The file system path of a local URI (plain path or `file://`)."""
    return uri.removeprefix("file://")


def open_bytes(uri: str):
    """A seekable binary file for `uri`; remote ones through fsspec with block caching."""
    if not is_remote(uri):
        return open(local_path(uri), "rb")
    import fsspec

    fs, path = fsspec.core.url_to_fs(
        uri
    )  # not fsspec.open: its options go to the file system, and S3's refuses this one
    return fs.open(path, "rb", block_size=4 << 20)
