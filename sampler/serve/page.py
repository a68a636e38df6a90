"""The page of `datakit sample serve`, in Gradio: fields, a player, and a gallery of what the result catalog holds."""

from __future__ import annotations

import html
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import gradio as gr
import numpy as np
import polars as pl
from pydantic import ValidationError

from catalogs.browse.media import inside
from datakit.errors import ConfigError, DatakitError
from datakit.video.reader import VideoReader
from sampler.generation.sample_spec import mode_of, shape_of
from sampler.prompts.prompt import Prompt
from sampler.prompts.references import Reference
from sampler.settings import SampleSettings
from sampler.video_files import is_played, write, write_picture
from trainer.diffusion.conditioning import MODES, Given

if TYPE_CHECKING:
    from sampler.generation.run_passes import Sampled
    from sampler.serve.studio import Studio, Work

log = logging.getLogger("datakit")
LISTED = 48
"""Samples in the gallery, the newest."""
SIDE = 256
"""Longer side of their pictures, pixels."""
RESOLUTIONS = ["256px", "384px", "512px", "768px"]
ASPECTS = ["16:9", "9:16", "4:3", "3:4", "1:1", "2.39:1"]
LETTERS = 60
"""Of a prompt, in the gallery."""
TOLD_S = 0.2
"""Between two tellings of progress."""
ERROR_S = 20.0
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of what a page does by the way."""
CSS = (
    "#gallery .caption-label {max-width: 100%; white-space: normal; text-overflow: clip; font-size: 11px; "
    "line-height: 1.25}"
)


@dataclass(frozen=True)
class Options:
    """What the fields say, as they stand there: one attribute each. Numbers and sizes that are left empty are None."""

    prompt: str
    mode: str
    references: Sequence[str]
    resolution: str | None
    aspect_ratio: str | None
    num_frames: float | None
    steps: float | None
    guidance: float | None
    image_guidance: float | None
    seed: float | None
    samples: float | None
    motion: str
    negative: str
    height: float | None
    width: float | None
    fps: float | None
    refine: bool

    @classmethod
    def of_settings(cls, settings: SampleSettings, shape: tuple[int, int, int] | None, fps: float | None) -> Options:
        """What the fields begin with.

        Args:
            shape: frames, height and width that follow from settings and checkpoint; None: nothing says.
        """
        video, sampling, motion = settings.video, settings.sampling, settings.prompt.motion
        frames, height, width = shape or (None, None, None)
        if video.resolution is not None:
            height = width = None
        return cls(
            "",
            mode_of(settings),
            (),
            video.resolution,
            video.aspect_ratio if height is None else None,
            frames,
            sampling.steps,
            sampling.guidance,
            sampling.image_guidance,
            settings.seed,
            settings.samples,
            "" if motion is None else str(motion),
            settings.prompt.negative,
            height,
            width,
            fps,
            settings.prompt.refine,
        )

    @classmethod
    def of_row(cls, row: Mapping[str, Any], references: Sequence[str]) -> Options:
        """What makes a sample of the table `samples` again, with as few others of its prompt as there can be."""
        told = json.loads(row["options"])["prompt"]
        motion = "auto" if told["motion"] == "auto" else row["motion"]
        return cls(
            row["prompt"],
            row["mode"],
            references,
            None,
            None,
            row["num_frames"],
            row["steps"],
            row["guidance"],
            row["image_guidance"],
            row["seed"],
            row["number"] + 1,
            "" if motion is None else str(motion),
            row["negative"],
            row["height"],
            row["width"],
            row["fps"],
            told["refine"],
        )

    def read(self, base: SampleSettings) -> tuple[Prompt, SampleSettings]:
        """What is asked for.

        Args:
            base: says what there is no field for.

        Raises:
            ConfigError: no prompt, or options that make no sense.
        """
        if not self.prompt.strip():
            raise ConfigError("the prompt is empty: say what the video shows")
        values = base.model_dump()
        values |= {"seed": self.seed, "samples": self.samples}
        values["video"] |= {
            "mode": self.mode,
            "resolution": self.resolution or None,
            "aspect_ratio": self.aspect_ratio or None,
            "height": self.height,
            "width": self.width,
            "num_frames": self.num_frames,
            "fps": self.fps,
        }
        values["sampling"] |= {"steps": self.steps, "guidance": self.guidance, "image_guidance": self.image_guidance}
        values["prompt"] |= {"motion": self.motion.strip() or None, "refine": self.refine}
        try:
            settings = SampleSettings.model_validate(values)
        except ValidationError as e:
            raise ConfigError(_explained(e)) from e
        given = self.references if _gives(self.mode) else ()
        return Prompt(
            self.prompt.strip(), references=tuple(map(Reference, given)), negative=self.negative, where="this prompt"
        ), settings


class Shelf:
    """What is in the result catalog, for people to look at.

    Args:
        scratch: folder for pictures, and for videos that browsers cannot play as they are.
    """

    def __init__(self, studio: Studio, scratch: Path):
        self.studio, self.scratch = studio, scratch
        self._writing = threading.Lock()

    def newest(self) -> tuple[list[tuple[str, str]], list[str]]:
        """Pictures with a line about each, and the samples' ids."""
        rows = (
            self.studio.catalog()
            .scan("samples")
            .filter(pl.col("status") == "done")
            .sort("finished_at", descending=True)
        )
        pictures, ids = [], []
        for row in rows.head(LISTED).collect().to_dicts():
            try:
                pictures.append((self._picture(row), _title(row)))
            except DatakitError as e:  # deleted, or no video any more: the others are there
                log.warning("not in the gallery: %s", e)
            else:
                ids.append(row["sample_id"])
        return pictures, ids

    def row(self, sample_id: str) -> dict[str, Any]:
        """Of a finished sample.

        Raises:
            ConfigError: there is none any more.
        """
        rows = (
            self.studio.catalog()
            .scan("samples")
            .filter((pl.col("sample_id") == sample_id) & (pl.col("status") == "done"))
        )
        for row in rows.collect().to_dicts():
            return row
        raise ConfigError("this sample is not in the catalog any more")

    def shown(self, sample_id: str) -> tuple[Any, ...]:
        """What the page shows when a sample is there: its video, what there is to say about it, and the gallery."""
        row = self.row(sample_id)
        return self.video(row), _about(row), *self.newest()

    def video(self, row: Mapping[str, Any]) -> str:
        """A file that browsers play; samples in another form are encoded anew.

        Raises:
            DatakitError: there is none any more.
        """
        path = self._file(row)
        if is_played(path):
            return str(path)
        with self._writing:
            again = self.scratch / f"{row['sample_id']}.mp4"
            return str(again if again.exists() else write(_pixels(path), again.with_suffix(""), row["fps"]))

    def references(self, row: Mapping[str, Any]) -> list[str]:
        """Those that may be shown: kept by the page, and still there."""
        kept = (
            self.studio.references / Path(uri).name for uri in row["references"] or ()
        )  # the folder may have been moved
        return [str(path) for path in kept if path.exists()]

    def _picture(self, row: Mapping[str, Any]) -> str:
        file = self._file(row)
        with self._writing:
            path = self.scratch / f"{row['sample_id']}.png"
            if not path.exists():
                with VideoReader(str(min(file.iterdir()) if file.is_dir() else file)) as reader:
                    write_picture(next(reader.frames()).rgb(SIDE), path)
            return str(path)

    def _file(self, row: Mapping[str, Any]) -> Path:
        path = Path(inside(self.studio.catalog(), row["path"]))
        if not path.exists():
            raise ConfigError(f"{path} is not there any more")
        return path


def theme() -> gr.themes.Base:
    """With the fonts of the system."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def make_page(studio: Studio, scratch: Path) -> gr.Blocks:
    """The page, not yet served."""
    shelf = Shelf(studio, scratch)
    start = Options.of_settings(studio.settings, *_usual(studio))
    with gr.Blocks(title=f"datakit: {studio.checkpoint.name}", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f"<h3>{html.escape(studio.checkpoint.name)}</h3>", padding=False)
        with gr.Row():
            with gr.Column(scale=5, min_width=420):
                inputs = _fields(start, studio.checkpoint.architecture.takes_condition)
                button = gr.Button("Make", variant="primary", elem_id="make")
            with gr.Column(scale=6, min_width=480):
                video = gr.Video(
                    label="Video",
                    autoplay=True,
                    loop=True,
                    interactive=False,
                    height=440,
                    elem_id="video",
                    buttons=["download"],
                )
                about = gr.Textbox(label="About it", lines=4, interactive=False, elem_id="about")
        gr.Markdown("Made so far, the newest first. A click shows one, and puts its options into the fields.")
        gallery = gr.Gallery(
            columns=7,
            height=420,
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            fit_columns=False,
            show_label=False,
            elem_id="gallery",
            buttons=[],
        )
        ids, work = gr.State([]), gr.State()

        def submit(*values: Any) -> tuple[Work, Any]:
            try:
                return studio.submit(*_options(values).read(studio.settings)), gr.update(interactive=False)
            except Exception as e:
                _show(e)

        def follow(work: Work, progress: gr.Progress = gr.Progress()) -> Iterator[Any]:
            try:
                progress(0.0, desc="waiting")
                told = 0.0
                for event in work.events():
                    if (
                        time.monotonic() - told > TOLD_S or event.made is not None
                    ):  # small models step faster than a page can show
                        told = time.monotonic()
                        progress((event.done, event.of), desc=event.text, unit="steps")
                    if event.made is not None:
                        yield shelf.shown(event.made.sample_id)
                _tell(done := work.result())
                if not done.done + done.failed:
                    yield shelf.shown(work.samples[0].sample_id)
            except (Exception, KeyboardInterrupt) as e:
                _show(e)

        def choose(ids: list[str], chosen: gr.SelectData) -> list[Any]:
            try:
                row = shelf.row(ids[chosen.index])
                references = shelf.references(row)
                if len(references) < len(row["references"] or ()):
                    gr.Info(
                        f"Its references are not kept by this page: {html.escape(', '.join(row['references']))}",
                        duration=ERROR_S,
                    )
                found = Options.of_row(row, references)
                return [shelf.video(row), _about(row), *(getattr(found, name) for name in inputs)]
            except DatakitError as e:
                _show(e)

        begun = button.click(submit, list(inputs.values()), [work, button], **QUIET)
        followed = begun.success(
            follow,
            [work],
            [video, about, gallery, ids],
            show_progress_on=video,
            concurrency_limit=None,
            api_visibility="private",
        )
        followed.then(lambda: gr.update(interactive=True), None, [button], **QUIET)
        gallery.select(choose, [ids], [video, about, *inputs.values()], **QUIET)
        page.load(shelf.newest, None, [gallery, ids], **QUIET)
    return page.queue(api_open=False)


def _fields(start: Options, takes_condition: bool) -> dict[str, Any]:
    """A field for each attribute of `Options`, in their order."""
    made: dict[str, Any] = {}
    made["prompt"] = gr.Textbox(label="Prompt", lines=3, elem_id="prompt", placeholder="What the video shows")
    with gr.Row():
        modes = list(MODES) if takes_condition else ["t2v"]
        made["mode"] = gr.Dropdown(modes, value=start.mode, label="Mode", elem_id="mode", min_width=160, scale=2)
        made["seed"] = _number("Seed", start.seed, "seed")
        made["samples"] = _number("Samples", start.samples, "samples")
    made["references"] = gr.Gallery(
        label=_wanted(start.mode),
        file_types=["image", "video"],
        type="filepath",
        columns=3,
        height=200,
        object_fit="contain",
        fit_columns=False,
        interactive=True,
        visible=_gives(start.mode),
        elem_id="references",
        buttons=[],
    )
    with gr.Row():
        made["resolution"] = _dropdown("Resolution", RESOLUTIONS, start.resolution, "resolution")
        made["aspect_ratio"] = _dropdown("Aspect ratio", ASPECTS, start.aspect_ratio, "aspect_ratio")
        made["height"] = _number("or height", start.height, "height")
        made["width"] = _number("and width", start.width, "width")
    with gr.Row():
        made["num_frames"] = _number("Frames", start.num_frames, "num_frames")
        made["fps"] = _number("Frames per second", start.fps, "fps")
        made["motion"] = gr.Textbox(
            start.motion,
            label="Motion score, or auto",
            elem_id="motion",
            max_lines=1,
            min_width=100,
            placeholder="none",
        )
    with gr.Row():
        made["steps"] = _number("Steps", start.steps, "steps")
        made["guidance"] = _number("Guidance", start.guidance, "guidance")
        made["image_guidance"] = _number("Image guidance", start.image_guidance, "image_guidance")
    with gr.Accordion("More", open=False):
        made["negative"] = gr.Textbox(start.negative, label="Negative prompt", lines=2, elem_id="negative")
        made["refine"] = gr.Checkbox(
            start.refine, label="Have a language model write the prompt out first", elem_id="refine"
        )
    _wire(made)
    return {field.name: made[field.name] for field in fields(Options)}


def _wire(made: Mapping[str, Any]) -> None:
    """References show where the mode takes some; a size is said in one way, the other one is emptied."""
    made["mode"].change(
        lambda mode: gr.update(visible=_gives(mode), label=_wanted(mode)), [made["mode"]], [made["references"]], **QUIET
    )
    for name in ("resolution", "aspect_ratio"):
        made[name].input(None, None, [made["height"], made["width"]], js="() => [null, null]", **QUIET)
    for name in ("height", "width"):
        made[name].input(None, None, [made["resolution"], made["aspect_ratio"]], js="() => [null, null]", **QUIET)


def _dropdown(label: str, choices: list[str], value: str | None, name: str) -> gr.Dropdown:
    return gr.Dropdown(choices, value=value, label=label, allow_custom_value=True, elem_id=name, min_width=100)


def _number(label: str, value: float | None, name: str) -> gr.Number:
    return gr.Number(value, label=label, elem_id=name, min_width=100)


def _options(values: Sequence[Any]) -> Options:
    told = dict(zip((field.name for field in fields(Options)), values, strict=True))
    told["references"] = [path for path, _ in told["references"] or ()]
    return Options(**told)


def _usual(studio: Studio) -> tuple[tuple[int, int, int] | None, float | None]:
    """Shape and frame rate of what is made unless the fields say otherwise."""
    usual = studio.checkpoint.usual
    try:
        shape = shape_of(studio.settings, studio.checkpoint, studio.autoencoder)
    except (
        ConfigError
    ):  # the checkpoint does not say: the fields stay empty, and what is missing is told when they are read
        shape = None
    return shape, studio.settings.video.fps or (usual.fps if usual else None)


def _explained(error: ValidationError) -> str:
    """The first thing that is wrong with options, by name."""
    first = error.errors()[0]
    got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
    return f"{'.'.join(map(str, first['loc'][:2]))}: {first['msg']}{got}"


def _gives(mode: str) -> bool:
    return MODES[mode] != Given()


def _wanted(mode: str) -> str:
    """What the references of a mode are."""
    given = MODES[mode]
    what = "picture" if given.head + given.tail <= 2 else f"video, at least {given.head + given.tail} frames"
    where = "where it begins" if given.head else "where it ends"
    if given.head and given.tail:
        where = "where it begins, then where it ends (or one for both)"
    return f"Reference: {what}, {where}"


def _title(row: Mapping[str, Any]) -> str:
    prompt = row["prompt"] if len(row["prompt"]) <= LETTERS else f"{row['prompt'][: LETTERS - 1]}…"
    return f"{prompt} · {row['mode']} · seed {row['seed']}" + (f" · {row['number']}" if row["number"] else "")


def _about(row: Mapping[str, Any]) -> str:
    seconds = sum(row[name] or 0.0 for name in ("encode_s", "denoise_s", "decode_s"))
    return (
        f"{row['text']}\n{row['mode']}, {row['num_frames']} frames of {row['height']}×{row['width']} at "
        f"{row['fps']:g} frames/s, "
        f"{row['steps']} steps, guidance {row['guidance']:g}, seed {row['seed']}, number {row['number']}\n"
        f"{row['path']}, made in {seconds:.1f} s"
    )


def _pixels(path: Path) -> np.ndarray:
    """uint8 [T, h, w, 3] of a video or a folder of pictures."""
    pixels = []
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with VideoReader(str(file)) as reader:
            pixels += [picture.rgb() for picture in reader.frames()]
    return np.stack(pixels)


def _tell(done: Sampled) -> None:
    """What became of a request, unless it is simply there."""
    if done.failed:
        gr.Warning(html.escape(f"{done.failed} of {done.asked} failed: {done.first_problems[0]}"), duration=ERROR_S)
    if done.there:
        gr.Info(f"{done.there} of {done.asked} were there already: another seed gives another video", duration=ERROR_S)


def _show(error: BaseException) -> NoReturn:
    """A message on the page; of an error that is none of the user's, the rest goes to the log."""
    told = isinstance(error, (DatakitError, KeyboardInterrupt))
    if not told:
        log.error("sampling failed", exc_info=error)
    message = " ".join(str(error).split()) if told else f"{type(error).__name__}: {error}"
    raise gr.Error(html.escape(message), duration=ERROR_S, print_exception=False) from None
