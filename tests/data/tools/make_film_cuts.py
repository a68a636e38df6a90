"""The cuts that PySceneDetect's own command line finds in the whole of Big Buck Bunny: writes tests/data/film_cuts.json.

PYTHONPATH=.:tests .venv/bin/python tests/data/tools/make_film_cuts.py "$(.venv/bin/python scripts/fetch_film.py)"
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from support.cut_lists import DISTRIBUTION, cli_cuts

TARGET = Path(__file__).parents[1] / "film_cuts.json"


def main(film: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cuts = cli_cuts(film, "adaptive", Path(folder))
    TARGET.write_text(json.dumps({"version": version(DISTRIBUTION), "detector": "adaptive", "cuts": cuts}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
