"""VBench's lists of prompts, and the folder that its evaluation reads."""

import json
import os

import pytest

from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError, ConfigError
from sampler.prompts.vbench import export_vbench, vbench_prompts
from support.sample_catalogs import drifting, result_catalog, sample

FULL_INFO = [
    {"prompt_en": "a bicycle slowing down", "dimension": ["motion_smoothness", "subject_consistency"]},
    {"prompt_en": "a red car", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": "a bicycle slowing down", "dimension": ["dynamic_degree"]},
]


def listed(folder, text: str, name: str = "all_dimension.txt"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_list_is_a_prompt_on_each_line(tmp_path):
    path = listed(tmp_path, "a bicycle\n\n  Ein Fluß in den Bergen \r\na bicycle\n")
    assert vbench_prompts(path) == ["a bicycle", "Ein Fluß in den Bergen"]


def test_the_full_list_says_which_prompt_judges_what(tmp_path):
    path = listed(tmp_path, json.dumps(FULL_INFO), "VBench_full_info.json")
    assert vbench_prompts(path) == ["a bicycle slowing down", "a red car"]
    assert vbench_prompts(path, "color") == ["a red car"]
    assert vbench_prompts(str(path), "dynamic_degree") == ["a bicycle slowing down"]


@pytest.mark.parametrize(
    "name, text, dimension, words",
    [
        ("full.json", json.dumps(FULL_INFO), "colour", "no dimension 'colour': there are color, dynamic_degree"),
        ("full.json", '[{"prompt": "x"}]', None, "no list of VBench"),
        ("full.json", "{", None, "no list of VBench"),
        ("list.txt", "a bicycle", "color", "give VBench_full_info.json"),
        ("list.txt", "\n \n", None, "holds no prompts"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, name, text, dimension, words):
    with pytest.raises(ConfigError, match=words) as error:
        vbench_prompts(listed(tmp_path, text, name), dimension)
    assert "\n" not in str(error.value)


def test_a_list_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*none.txt: No such file"):
        vbench_prompts(tmp_path / "none.txt")


def rows_of(root, rows: list[dict]) -> Catalog:
    """A catalog of samples without rows in `videos`; each has a file of its own content."""
    catalog = Catalog.create(root)
    (root / "files").mkdir()
    for i, row in enumerate(rows):
        row.setdefault("path", f"files/{i}.mp4")
        (root / row["path"]).write_bytes(f"{row['prompt']} {row['seed']} {row['number']}".encode())
    catalog.append("samples", rows)
    return catalog


def test_samples_are_numbered_from_zero_for_each_prompt(tmp_path):
    rows = [sample("a red car", seed=seed, number=number) for seed, number in ((7, 1), (3, 0), (7, 0), (3, 1), (9, 0))]
    rows_of(tmp_path / "s", [*rows, sample("two. dogs, 'running'"), sample("not made", status="failed")])
    assert export_vbench(str(tmp_path / "s"), tmp_path / "out" / "videos") == 6
    found = {path.name: path.read_text() for path in (tmp_path / "out" / "videos").iterdir()}
    order = [(3, 0), (3, 1), (7, 0), (7, 1), (9, 0)]
    assert found == {
        **{f"a red car-{i}.mp4": f"a red car {seed} {number}" for i, (seed, number) in enumerate(order)},
        "two. dogs, 'running'-0.mp4": "two. dogs, 'running' 42 0",
    }
    linked = (tmp_path / "out" / "videos" / "a red car-0.mp4").stat()
    assert linked.st_nlink == 2, "a link where that can be"


def test_a_real_result_catalog_exports_videos_that_play(tmp_path):
    import av

    result_catalog(tmp_path / "s", {"a texture": drifting(1)})
    assert export_vbench(str(tmp_path / "s"), tmp_path / "out") == 1
    with av.open(str(tmp_path / "out" / "a texture-0.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9


@pytest.mark.parametrize(
    "rows, words",
    [
        ([sample("either/or"), sample("and/or"), sample("fine")], r"2 with a slash \('and/or'; 'either/or'\)"),
        ([sample("x" * 250)], "1 longer than 255 bytes"),
        ([sample("ü" * 125)], "1 longer than 255 bytes"),
        ([sample("")], "1 empty"),
        ([sample("a", path="files/0.mkv")], "1 samples are not .first: files/0.mkv.*output.format=mp4"),
        ([sample("a"), sample("a", checkpoint="other/step-7")], "2 checkpoints .step-7, step-100."),
    ],
)
def test_what_vbench_could_not_read_is_refused_and_nothing_is_written(tmp_path, rows, words):
    rows_of(tmp_path / "s", [dict(row) for row in rows])
    with pytest.raises(ConfigError, match=words) as error:
        export_vbench(str(tmp_path / "s"), tmp_path / "out")
    assert not (tmp_path / "out").exists() and "\n" not in str(error.value)


def test_a_folder_in_use_and_lost_files_are_refused(tmp_path):
    rows_of(tmp_path / "s", [sample("a"), sample("b")])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other.mp4").write_bytes(b"")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export_vbench(str(tmp_path / "s"), tmp_path / "out")
    os.remove(tmp_path / "s" / "files" / "1.mp4")
    with pytest.raises(CatalogError, match="1 of 2 samples have no file any more"):
        export_vbench(str(tmp_path / "s"), tmp_path / "new")


def test_a_catalog_without_finished_samples_is_named(tmp_path):
    catalog = Catalog.create(tmp_path / "s")
    with pytest.raises(CatalogError, match="no finished samples .nor any others."):
        export_vbench(catalog.root, tmp_path / "out")
    catalog.append(
        "samples", [sample("a", status="queued"), sample("b", status="queued"), sample("c", status="failed")]
    )
    with pytest.raises(CatalogError, match="no finished samples .1 failed, 2 queued."):
        export_vbench(catalog.root, tmp_path / "out")
