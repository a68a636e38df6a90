"""Three small videos, and a catalog that they are imported into."""

from __future__ import annotations

from pathlib import Path

from catalogs.interop import import_dataset
from catalogs.tables.catalog import Catalog
from support.drawn_videos import encode, shots


def make(folder: Path) -> Path:
    """a.mp4, b.mp4, c.mp4 of 20, 21, 22 frames at 25 frames/s, 128 x 96."""
    folder.mkdir()
    for i, name in enumerate("abc"):
        encode(folder / f"{name}.mp4", shots([20 + i], 96, 128), 25, pix_fmt="yuv420p")
    return folder


def imported(folder: Path, root: Path) -> Catalog:
    """All files of the folder."""
    table = folder.parent / "table.csv"
    table.write_text("path\n" + "".join(f"{path}\n" for path in sorted(folder.iterdir())))
    import_dataset(str(table), str(root))
    return Catalog(root)
