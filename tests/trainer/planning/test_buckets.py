"""Shapes, tokens and batch sizes with known answers; the memory model against what was measured."""

import os

import pytest
import yaml

from datakit.config import load
from datakit.errors import ConfigError
from trainer.planning.buckets import area_of, bucket_table, sizes_of, tokens_of
from trainer.planning.memory_budget import DEFAULT_TOKENS, GIB, cost, gpu_gib, parameters, peak_bytes, tokens_that_fit
from trainer.planning.settings import ASPECTS, MemorySettings, PlanSettings

CUT = MemorySettings(double_blocks=4, single_blocks=8)
"""The model that memory was measured of (docs/benchmarks.md)."""


def settings(*sets: str) -> PlanSettings:
    return load(PlanSettings, None, sets)


def test_sizes_are_those_of_open_sora():
    assert sizes_of(256**2, ["16:9", "9:16", "1:1", "4:3", "3:4", "2.39:1"], (16, 16)) == (
        (192, 336),
        (336, 192),
        (256, 256),
        (224, 288),
        (288, 224),
        (160, 400),
    )
    assert sizes_of(768**2, ["16:9", "9:16", "1:1"], (16, 16)) == ((576, 1024), (1024, 576), (768, 768))
    assert sizes_of(64**2, ["1:1", "16:9"], (16, 16)) == ((64, 64), (48, 80))


@pytest.mark.parametrize("area", [64**2, 256**2, 480 * 480 * 16 // 9, 768**2])
@pytest.mark.parametrize("multiple", [8, 16, 32])
def test_every_size_is_of_the_multiple_and_near_the_area(area, multiple):
    sizes = sizes_of(area, ASPECTS, (multiple, multiple))
    assert len(sizes) == len(set(sizes)) and {(w, h) for h, w in sizes} == set(sizes)
    assert all(h % multiple == w % multiple == 0 for h, w in sizes)
    assert all(abs(h * w / area - 1) <= max(0.1, 2 * multiple / area**0.5) for h, w in sizes)


def test_aspects_and_resolutions_as_yaml_reads_them():
    """YAML 1.1 takes 16:9 for a number of base 60."""
    assert yaml.safe_load("[16:9, 2.39:1]") == [969, "2.39:1"]
    assert settings("aspects=[16:9, 9:16, 1:1, 2.39:1]").aspects == ["16:9", "9:16", "1:1", "2.39:1"]
    assert bucket_table(settings("resolutions=[256, 480p]")).levels[0].area == 409_600
    with pytest.raises(ConfigError, match="aspects.0"):
        settings("aspects=[wide]")
    with pytest.raises(ConfigError, match="no resolution '4k'"):
        bucket_table(settings("resolutions=[4k]"))
    with pytest.raises(ConfigError, match="two of the resolutions 256px, 256 are the same"):
        bucket_table(settings("resolutions=[256px, 256]"))


def test_tokens_of_a_sample():
    """docs/benchmarks.md: N with 512 of text."""
    default = settings()
    assert tokens_of(129, 192, 336, default) == 8828
    assert tokens_of(129, 256, 256, default) == 8960
    assert tokens_of(129, 576, 1024, default) == 76_544
    assert tokens_of(1, 192, 336, default) == 252 + 512
    dc_ae = settings("compression=[4, 32, 32]", "causal=false", "patch=1", "text_tokens=0")
    assert tokens_of(128, 192, 320, dc_ae) == 32 * 6 * 10


def test_frames_that_the_autoencoder_does_not_take():
    with pytest.raises(
        ConfigError, match=r"windows of 32 frames: a causal autoencoder takes 4k \+ 1 frames, for example 29 or 33"
    ):
        bucket_table(settings("frames=[32]"))
    with pytest.raises(
        ConfigError, match=r"windows of 33 frames: .* multiples of 4 frames from 8 on, for example 32 or 36"
    ):
        bucket_table(settings("frames=[33]", "causal=false"))
    with pytest.raises(ConfigError, match="for example 8 or 12"):
        bucket_table(settings("frames=[4]", "causal=false"))
    dc_ae = settings("frames=[1, 32, 64]", "causal=false", "compression=[4, 32, 32]", "patch=1")
    assert {b.frames for b in bucket_table(dc_ae).buckets} == {1, 32, 64}, "images as well"


def test_batches_fill_the_budget_and_cost_about_the_same():
    table = bucket_table(settings("tokens=18000", "frames=[1, 33, 129]"))
    by_name = {b.name: b for b in table.buckets}
    assert by_name["192x336x129"].batch == 2 and by_name["192x336x33"].batch == 6 and by_name["192x336x1"].batch == 23
    assert all(b.batch * b.tokens <= 18_000 < (b.batch + 1) * b.tokens for b in table.buckets)
    assert bucket_table(settings()).budget == DEFAULT_TOKENS


def test_buckets_over_the_budget_are_named():
    table = bucket_table(settings("resolutions=[256px, 768px]", "aspects=['16:9']", "tokens=18000", "frames=[1, 129]"))
    assert table.too_large == (("576x1024x129", 76_544),)
    assert [b.name for b in table.buckets] == ["576x1024x1", "192x336x129", "192x336x1"]
    with pytest.raises(
        ConfigError, match="no bucket fits: 192x336x129, the smallest, takes 8,828 tokens a sample, the budget is 8,000"
    ):
        bucket_table(settings("aspects=['16:9']", "frames=[129]", "tokens=8000"))


def test_a_table_in_open_soras_form():
    config = "bucket_config={256px: {1: [1.0, 45], 33: [0.5, 12], 129: [[1.0, 0.25], null]}, 768px: {33: [1, 1]}}"
    table = bucket_table(settings(config, "aspects=['16:9', '1:1']", "tokens=9000"))
    assert [(level.name, [(n.frames, n.keep, n.keep_frames) for n in level.lengths]) for level in table.levels] == [
        ("768px", [(33, 1.0, 1.0)]),
        ("256px", [(129, 1.0, 0.25), (33, 0.5, 1.0), (1, 1.0, 1.0)]),
    ]
    assert {b.name: b.batch for b in table.buckets} == {
        "576x1024x33": 1,
        "768x768x33": 1,
        "192x336x129": 1,
        "256x256x129": 1,
        "192x336x33": 12,
        "256x256x33": 12,
        "192x336x1": 45,
        "256x256x1": 45,
    }
    for wrong, why in [
        ("{256px: {33: [1.5, 1]}}", "a probability lies between 0 and 1, not 1.5"),
        ("{256px: {33: [1, 0]}}", "at least one sample"),
        ("{}", "bucket_config is empty"),
        ("{256px: {33: 1}}", "bucket_config.256px.33"),
    ]:
        with pytest.raises(ConfigError, match=why):
            bucket_table(settings(f"bucket_config={wrong}"))


def test_weights_are_of_buckets_that_there_are():
    table = bucket_table(settings("weights={1: 0.5}", "frames=[1, 33]"))
    assert {(b.frames, b.weight) for b in table.buckets} == {(1, 0.5), (33, 1.0)}
    with pytest.raises(ConfigError, match="plan.weights: no bucket has 65 frames"):
        bucket_table(settings("weights={65: 2}", "frames=[1, 33]"))


@pytest.mark.parametrize(
    "recompute, frames_tokens, batch, measured",
    [(0.0, 8828, 1, 47.9), (0.0, 2780, 1, 47.9), (1.0, 8828, 3, 48.0), (0.0, 8828, 2, 56.7), (0.0, 2780, 4, 48.1)],
)
def test_the_memory_model_agrees_with_the_h100(recompute, frames_tokens, batch, measured):
    """GiB of docs/benchmarks.md; what is missing is within the reserve."""
    predicted = peak_bytes(CUT.model_copy(update={"recompute": recompute}), frames_tokens * batch) / GIB
    assert predicted == pytest.approx(measured, rel=0.05) and predicted + CUT.reserve_gib > measured


def test_what_fits_fits():
    tokens = tokens_that_fit("80gb", CUT)
    assert tokens > 2 * 8828
    assert peak_bytes(CUT, tokens) <= (78 - CUT.reserve_gib) * GIB < peak_bytes(CUT, tokens + 100)
    assert tokens_that_fit("141gb", CUT) > tokens > tokens_that_fit("80gb", CUT.model_copy(update={"reserve_gib": 12}))
    assert tokens_that_fit(78, CUT) == tokens


def test_sharding_recomputing_and_lora_make_room():
    """The released model: 11.8 G in the blocks; whole on one GPU it does not fit."""
    whole = MemorySettings()
    assert parameters(whole) == pytest.approx(11.891e9, rel=0.01)
    with pytest.raises(ConfigError, match=r"a model of 11.8 G parameters takes 220 GiB .* 78 GiB are there less 2"):
        tokens_that_fit("80gb", whole)
    divided = whole.model_copy(update={"shards": 16})
    assert tokens_that_fit("80gb", divided.model_copy(update={"recompute": 1.0})) > 8 * tokens_that_fit("80gb", divided)
    assert tokens_that_fit("80gb", whole.model_copy(update={"trained": 0.01})) > 8828
    by_stage = [peak_bytes(whole.model_copy(update={"shards": 16, "zero": z}), 1) / GIB for z in (0, 1, 2, 3)]
    assert by_stage == sorted(by_stage, reverse=True) and by_stage[0] > 5 * by_stage[2] > 5 * by_stage[3]


def test_cost_is_that_of_the_model():
    """docs/benchmarks.md: TFLOP of one forward."""
    assert cost(8828, MemorySettings()) / 1e12 == pytest.approx(168.6, rel=1e-3)
    assert cost(76_544, MemorySettings()) / 1e12 == pytest.approx(5092, rel=1e-3)


def test_gpus(tmp_path, monkeypatch):
    assert [gpu_gib(g) for g in ("24gb", "80GB", 11.5, "16")] == [23, 78, 11.5, 16]
    for wrong in ("h100", "0", -1):
        with pytest.raises(
            ConfigError, match=f"no GPU {wrong!r}: plan.gpu is one of 24gb, .*, a number of GiB, or here"
        ):
            gpu_gib(wrong)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no GPU here: name one .* or give the tokens"):
        gpu_gib("here")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    os.chmod(tool, 0o755)
    assert gpu_gib("here") == pytest.approx(39.2)


def test_settings_that_exclude_each_other():
    with pytest.raises(ConfigError, match="tokens or gpu"):
        settings("tokens=1", "gpu=80gb")
    with pytest.raises(ConfigError, match="global_batch or global_tokens"):
        settings("global_batch=1", "global_tokens=1")
    with pytest.raises(ConfigError, match="unknown setting max_corp: did you mean max_crop"):
        settings("max_corp=0.1")
    with pytest.raises(ConfigError, match="unknown setting memory.shard"):
        settings("memory.shard=2")


@pytest.mark.parametrize("down, across", [(16, 16), (16, 32), (32, 16), (8, 24)])
def test_sizes_are_the_nearest_to_the_area_of_five(down, across):
    """From the largest multiples within the area, or one step further in either direction; the first where two are as
    near."""
    for area in [64, 900, *(n * n + 7 * n for n in range(60, 1100, 37))]:
        for ratio in (1.0, 1.25, 4 / 3, 1.6, 16 / 9, 1.85, 2.0, 2.39, 3.1):
            w = max(int((area * ratio) ** 0.5 / across), 1) * across
            h = max(int(area / w / down), 1) * down
            steps = [(h, w), (h - down, w), (h + down, w), (h, w - across), (h, w + across)]
            nearest = min((s for s in steps if all(s)), key=lambda s: abs(s[0] * s[1] - area))
            assert sizes_of(area, [f"{ratio}:1"], (down, across)) == (nearest,), (area, ratio)
            assert sizes_of(area, [f"1:{ratio}"], (across, down)) == (nearest[::-1],) or ratio == 1


def test_height_and_width_have_their_own_multiples():
    table = bucket_table(settings("compression=[4, 8, 16]", "aspects=['16:9', '9:16']", "frames=[1]"))
    assert [(b.height, b.width) for b in table.buckets] == [(208, 320), (336, 192)]


def test_levels_point_to_their_buckets():
    """One bucket for each size and length that fits the budget; -1 for others. By area, not by name."""
    sizes = ("resolutions=['256px', '1024px', '480p']", "aspects=['16:9', '1:1']", "frames=[1, 33]", "tokens=5000")
    table = bucket_table(settings(*sizes))
    assert [(level.name, level.area) for level in table.levels] == [
        ("1024px", 1024**2),
        ("480p", 409_600),
        ("256px", 256**2),
    ]
    pointed = [[(n.frames, n.buckets) for n in level.lengths] for level in table.levels]
    assert pointed == [[(33, (-1, -1)), (1, (0, 1))], [(33, (-1, -1)), (1, (2, 3))], [(33, (4, 5)), (1, (6, 7))]]
    names = [
        "768x1360x1",
        "1024x1024x1",
        "480x848x1",
        "640x640x1",
        "192x336x33",
        "256x256x33",
        "192x336x1",
        "256x256x1",
    ]
    assert [b.name for b in table.buckets] == names and len(table.too_large) == 4
    assert {(n.keep, n.keep_frames) for level in table.levels for n in level.lengths} == {(1.0, 1.0)}


def test_the_smallest_bucket_is_named_when_none_fits():
    with pytest.raises(ConfigError, match="no bucket fits: 192x336x33, the smallest, takes 2,780 tokens a sample"):
        bucket_table(settings("aspects=['1:1', '16:9']", "frames=[33, 129]", "tokens=2779"))
    assert bucket_table(settings("aspects=['16:9']", "frames=[33]", "tokens=2780")).buckets[0].batch == 1


def test_the_budget_is_given_or_that_of_a_gpu():
    divided = ("gpu=80gb", "memory.shards=16")
    assert bucket_table(settings(*divided)).budget == tokens_that_fit("80gb", MemorySettings(shards=16))
    assert bucket_table(settings("tokens=9001")).budget == 9001


def test_latent_frames_of_every_kind_of_autoencoder():
    causal = settings("compression=[2, 8, 8]", "text_tokens=0")
    assert [tokens_of(frames, 16, 16, causal) for frames in (1, 3, 5, 9)] == [1, 2, 3, 5]
    alone = settings("compression=[1, 8, 8]", "text_tokens=0")
    assert [tokens_of(frames, 16, 16, alone) for frames in (1, 2, 3)] == [1, 2, 3]
    multiples = settings("causal=false", "text_tokens=7")
    assert [tokens_of(frames, 16, 48, multiples) for frames in (1, 8, 12)] == [3 + 7, 2 * 3 + 7, 3 * 3 + 7]


def test_lengths_and_probabilities_at_their_limits():
    shortest = settings("frames=[8]", "causal=false")
    assert {b.frames for b in bucket_table(shortest).buckets} == {8}
    extremes = settings("bucket_config={256px: {1: [0, 1], 33: [[1, 0], 2]}}", "aspects=['1:1']")
    (level,) = bucket_table(extremes).levels
    assert [(n.frames, n.keep, n.keep_frames) for n in level.lengths] == [(33, 1.0, 0.0), (1, 0.0, 1.0)]
    for wrong in ("-0.1", "1.01", "[0.5, -0.1]"):
        with pytest.raises(ConfigError, match="a probability lies between 0 and 1"):
            bucket_table(settings(f"bucket_config={{256px: {{33: [{wrong}, 1]}}}}"))


@pytest.mark.parametrize("resolution, area", [("1", 1), ("1px", 1), ("256", 65_536), ("480p", 409_600), ("9p", 144)])
def test_areas(resolution, area):
    assert area_of(resolution) == area


@pytest.mark.parametrize("resolution", ["0", "0p", "px", "256 px", "2.5px", "x256"])
def test_what_is_no_resolution(resolution):
    with pytest.raises(ConfigError, match="no resolution"):
        area_of(resolution)
