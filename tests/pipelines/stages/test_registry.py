"""What the registry makes of the stages' declarations."""

import subprocess
import sys
from dataclasses import replace

import pytest

from catalogs.tables import schema
from datakit import config
from datakit.columns import Column
from pipelines.settings import Settings
from pipelines.stages.base import FrameStage, Stage
from pipelines.stages.ocr import Ocr
from pipelines.stages.registry import STAGES, checked, fingerprint

BY_DEFAULT = {
    "shots": "6fc3bc7ad6c80d7b",
    "jitter": "127f94a98473475f",
    "motion": "b2e64d5e7c87f124",
    "motion_vmaf": "3726e5e435f49ea0",
    "letterbox": "93ecec1924e6ef47",
    "quality": "9a5b4175ff630b55",
    "phash": "10121aa50379a923",
    "ocr": "a8cf72b78f9c6c4b",
    "nsfw": "a48afc9a5ec66c54",
    "technical_quality": "b48f27455ba0f0e2",
    "embed": "7bf9475a1b6a4964",
    "aesthetic": "a44c9a197e28e1f1",
    "caption_match": "1b095113c81ef8e2",
}
OTHERWISE = {
    "shots": "6c922d95d385dd0a",
    "jitter": "127f94a98473475f",
    "motion": "ff86157711d3f906",
    "motion_vmaf": "3726e5e435f49ea0",
    "letterbox": "93ecec1924e6ef47",
    "quality": "9a5b4175ff630b55",
    "phash": "10121aa50379a923",
    "ocr": "6da24e7d90f62ab5",
    "nsfw": "8210ee18cddced3f",
    "technical_quality": "0e84086ef1b0c12a",
    "embed": "ecc9450300a94be0",
    "aesthetic": "96189d0b0978a2f8",
    "caption_match": "a2e0c0089c3aded9",
}
"""As catalogs have them since before stages were classes: a change would measure every clip again."""


def test_fingerprints_are_those_that_catalogs_have(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"weights")
    (tmp_path / "head.bin").write_bytes(b"head")
    sets = [
        *("shots.detector=transnet", "shots.threshold=0.5", "shots.max_s=9", "motion.method=farneback", "ocr.side=480"),
        *("embed.model=ViT-B-32/openai", "embed.precision=fp16", "images.positions=[0.25, 0.75]"),
        *(f"embed.weights={tmp_path}/weights.bin", f"aesthetic.head={tmp_path}/head.bin"),
    ]
    for expected, given in ((BY_DEFAULT, []), (OTHERWISE, sets)):
        settings = config.load(Settings, None, given)
        assert {name: fingerprint(name, settings) for name in expected} == expected


def test_stages_come_after_those_they_build_on():
    assert list(STAGES)[:2] == ["shots", "jitter"] and list(BY_DEFAULT) == [n for n in STAGES if n in BY_DEFAULT]


def test_planning_loads_nothing_that_measures():
    code = (
        "import sys; from pipelines.settings import Settings; from pipelines.stages.registry import *;"
        "[(fingerprint(n, Settings()), missing_requirements(n, Settings())) for n in STAGES];"
        "print(sorted(m for m in sys.modules if '.' not in m))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(eval(done.stdout))
    assert "pydantic" in loaded
    assert not loaded & {"cv2", "av", "torch", "onnxruntime", "polars", "pyarrow", "deltalake", "ray", "catalogs"}


def test_every_column_is_declared_once_and_says_what_it_is():
    names = [c.name for c in (*schema.CLIPS, *schema.VIEW_ADDED)]
    assert len(names) == len(set(names)) and not set(names) & set(schema.VIEW_FROM_VIDEOS)
    for stage in STAGES.values():
        assert stage.summary() and all(c.meaning and c.filled_by == stage.name for c in stage.columns)


def test_a_stage_s_section_has_its_name_and_no_other_section_has_it():
    for name, stage in STAGES.items():
        section = getattr(Settings(), name, None)
        assert (section is None and stage.Settings is None) or type(section) is stage.Settings


def test_what_a_constructor_has_no_parameter_for_is_not_handed_to_it():
    assert Ocr.arguments(Settings().ocr) == {"side": 640, "batch": 8}
    assert Ocr.numbers() == ("side",)


class First(FrameStage):
    """First."""

    name = "first"
    version = "1"
    columns = (Column("brightness_of_first", "float32", "", "x"),)


def made(name: str, **attributes) -> type[Stage]:
    columns = (Column(f"of_{name}", "float32", "", "x"),)
    return type(name.title(), (FrameStage,), {"name": name, "version": "1", "columns": columns, **attributes})


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (made("first"), "two stages are called first"),
        (made("second", columns=First.columns), "stages first and second both fill the column brightness_of_first"),
        (made("second", upstream=("third",)), "second builds on third"),
        (made("second", upstream=("first",), order=1), "second builds on first, which does not come before it"),
    ],
)
def test_stages_that_do_not_go_together_are_errors(second, words):
    with pytest.raises(TypeError, match=words):
        checked([First, second])


def test_a_stage_without_a_version_is_an_error():
    with pytest.raises(TypeError, match="stage third has no version"):
        checked([type("Third", (FrameStage,), {"name": "third"})])


def test_columns_know_their_kind():
    column = First.columns[0]
    assert column.is_number and not column.is_whole and not column.is_text
    assert replace(column, type="int32").is_whole and replace(column, type="string").is_text
    assert not replace(column, type="binary").is_number
