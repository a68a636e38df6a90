"""A vision-language model of 0.4 million random parameters in a folder: for demos and tests of captioning where none
can be downloaded.

    .venv/bin/python scripts/tiny_vlm.py FOLDER

Its answers are nonsense, the same for the same clip. They end at any of many tokens, or they never would.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent / "tests" / "data" / "tools"
ENDS = 5
"""Every so many-th token of the vocabulary ends the answer."""


def main(folder: Path) -> None:
    sys.path.insert(0, str(TOOLS))
    import make_tiny_vlm

    make_tiny_vlm.build(str(folder), "qwen3_vl")
    config = folder / "generation_config.json"
    told = json.loads(config.read_text()) if config.exists() else {}
    size = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    config.write_text(json.dumps({**told, "eos_token_id": list(range(ENDS - 1, size, ENDS))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
