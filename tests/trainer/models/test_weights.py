"""Weights: read from every kind of place, loaded whole or not at all, saved so that no crash leaves half of them."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from datakit.errors import ConfigError, DatakitError, MissingDependency
from support.mmdit_golden import same
from trainer.models.common import weights
from trainer.models.common.weights import INDEX, WeightsError, load_weights, read_metadata, read_weights, save_weights

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "n": torch.tensor(7)}


# Reading


def test_every_kind_of_place_gives_the_same_tensors(tmp_path, monkeypatch):
    from huggingface_hub import constants

    file = tmp_path / "w.safetensors"
    save_weights(STATE, file, {"who": "us"})
    save_weights(STATE, tmp_path / "shards", {"who": "us"}, shard_bytes=24)
    diffusers = tmp_path / "diffusers"
    diffusers.mkdir()
    save_file({"a": STATE["a"]}, diffusers / "diffusion_pytorch_model-00001-of-00002.safetensors")
    save_file({"b": STATE["b"], "n": STATE["n"]}, diffusers / "diffusion_pytorch_model-00002-of-00002.safetensors")
    names = {"a": 1, "b": 2, "n": 2}
    (diffusers / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(
            {"weight_map": {k: f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for k, i in names.items()}}
        )
    )
    torch.save(STATE, tmp_path / "w.pt")
    torch.save({"state_dict": STATE, "epoch": 3}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    single = tmp_path / "single"
    single.mkdir()
    save_file(STATE, single / "any.safetensors")
    (single / "config.json").write_text("{}")
    cache, models = tmp_path / "cache", tmp_path / "models"
    snapshot = cache / "models--someone--something" / "snapshots" / "c0ffee"
    for place in (snapshot, models / "someone" / "else"):
        place.mkdir(parents=True)
        save_file(STATE, place / "x.safetensors")
        save_file({"a": STATE["a"] + 1}, place / "y.safetensors")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    for source in (
        file,
        str(file),
        tmp_path / "shards",
        tmp_path / "shards" / INDEX,
        diffusers,
        tmp_path / "w.pt",
        tmp_path / "old.bin",
        single,
        "someone/something:x.safetensors",
        "someone/else:x.safetensors",
    ):
        assert same(read_weights(source, folder=models), STATE), source
    assert (
        read_metadata(file)["who"] == read_metadata(tmp_path / "shards")["who"] == "us"
        and read_metadata(tmp_path / "w.pt") == {}
    )
    half = read_weights(file, torch.float16)
    assert [half[k].dtype for k in "abn"] == [torch.float16, torch.float16, torch.int64]
    with pytest.raises(ConfigError, match="several weights .x.safetensors, y.safetensors.: give the path of one"):
        read_weights("someone/else", folder=models)
    with pytest.raises(ConfigError, match="holds no z.safetensors"):
        read_weights("someone/else:z.safetensors", folder=models)
    with pytest.raises(MissingDependency, match="datakit models download no/where"):
        read_weights("no/where", folder=models)


def test_a_release_is_found_by_its_name_in_the_list(tmp_path):
    place = tmp_path / "hpcai-tech" / "Open-Sora-v2"
    place.mkdir(parents=True)
    save_file(STATE, place / "Open_Sora_v2.safetensors")
    save_file({"v": torch.ones(1)}, place / "hunyuan_vae.safetensors")
    assert same(read_weights("Open-Sora-v2/mmdit", folder=tmp_path), STATE)
    assert set(read_weights("Open-Sora-v2/hunyuan-vae", folder=tmp_path)) == {"v"}


def test_what_cannot_be_read_is_one_line(tmp_path):
    class Code:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "ran"),)

    def folder(name, files):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
        return tmp_path / name

    good = tmp_path / "good.safetensors"
    save_file(STATE, good)
    whole = good.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-5])
    torch.save({"a": Code()}, tmp_path / "evil.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"model": STATE, "optimizer": {"step": 3}}, tmp_path / "run.pt")
    torch.save([STATE["a"]], tmp_path / "list.pt")
    save_file({}, tmp_path / "none.safetensors")
    shard, second = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"
    index, lies = (json.dumps({"weight_map": names}).encode() for names in ({"a": shard, "z": second}, {"z": shard}))
    told = "m.safetensors.index.json"
    for source, words in (
        (tmp_path / "cut.safetensors", "damaged or not whole"),
        (tmp_path / "evil.pt", "could run code"),
        (tmp_path / "junk.pt", "junk.pt"),
        (tmp_path / "run.pt", "no state dict: it holds under model, optimizer"),
        (tmp_path / "list.pt", "it holds a list"),
        (tmp_path / "none.safetensors", "holds no tensors"),
        (folder("empty", {}), "holds no weights"),
        (folder("unfinished", {shard: whole}), "without their index"),
        (folder("gone", {shard: whole, told: index}), "1 missing .m-00002-of-00002.safetensors"),
        (folder("lies", {shard: whole, told: lies}), "what its index says: 1 missing .z"),
        (folder("broken", {told: b"{"}), "not a readable index"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            read_weights(source)
        assert "\n" not in str(caught.value) and str(source) in str(caught.value)
    assert not (tmp_path / "ran").exists(), "reading weights ran code"


def anonymous_mb() -> float:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def test_loading_a_model_that_has_no_memory_yet_takes_none_of_its_own(tmp_path):
    """64 MiB of weights: as many pages of the file, and no copy; the file does not change when they do."""
    big = tmp_path / "big.safetensors"
    save_file({"weight": torch.ones(4096, 4096)}, big)
    with torch.device("meta"):
        model = nn.Linear(4096, 4096, bias=False)
    before = anonymous_mb()
    load_weights(model, big)
    assert model.weight.sum() == 4096**2 and anonymous_mb() - before < 8
    with torch.no_grad():
        model.weight[0] = 5
    assert read_weights(big)["weight"].sum() == 4096**2 and model.weight.requires_grad


# Loading


def test_whatever_does_not_fit_is_named_with_its_shape_and_nothing_changes():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {
        "0.weight": torch.zeros(4, 5),
        "0.bias": torch.zeros(4),
        "1.weight": torch.zeros(2, 4),
        "1.scale": torch.zeros(7, 1),
    }
    with pytest.raises(WeightsError) as caught:
        load_weights(model, state)
    assert str(caught.value) == (
        "weights do not fit Sequential: 1 missing (1.bias [2]); 1 unexpected (1.scale [7, 1]); "
        "1 of another shape (0.weight [4, 5], wanted [4, 3])"
    )
    assert same(model.state_dict(), before)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (
        str(copy) == str(caught.value)
        and copy.missing == {"1.bias": (2,)}
        and copy.mismatched == {"0.weight": ((4, 5), (4, 3))}
    )


def test_a_thousand_keys_stay_readable_and_are_all_there():
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(1000))
    with pytest.raises(WeightsError) as caught:
        load_weights(model, {"x": torch.ones(1)})
    line = str(caught.value)
    assert len(line) < 400 and "1,000 missing (0.weight [2, 2], " in line and "7.weight [2, 2], and 992 more)" in line
    assert " 8.weight" not in line
    assert len(caught.value.missing) == 1000 and caught.value.unexpected == {"x": (1,)}


def test_what_is_allowed_to_be_missing_keeps_its_value_and_other_names_can_be_mapped():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    last = model[1].weight.clone()
    state = {"module.0.weight": torch.full((2, 2), 3.0), "module.0.bias": torch.ones(2), "module.ema.x": torch.ones(1)}
    load_weights(
        model, state, lambda name: name.removeprefix("module."), allow_missing=["1.*"], allow_unexpected=["ema.*"]
    )
    assert torch.equal(model[0].weight, state["module.0.weight"]) and torch.equal(model[1].weight, last)
    with pytest.raises(WeightsError, match="2 missing .1.weight"):
        load_weights(
            model, state, lambda name: name.removeprefix("module."), allow_missing=["0.*"], allow_unexpected=["ema.*"]
        )
    with pytest.raises(ConfigError, match="two weights the name w"):
        load_weights(model, state, lambda name: "w")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(WeightsError, match="2 missing"):  # it would have no value to keep
        load_weights(
            empty, state, lambda name: name.removeprefix("module."), allow_missing=["1.*"], allow_unexpected=["ema.*"]
        )


def test_dtypes_follow_the_model_or_the_file_or_what_is_asked():
    state = {"weight": torch.full((2, 2), 1 / 3), "bias": torch.zeros(2)}
    model = nn.Linear(2, 2).bfloat16()
    load_weights(model, state)
    assert model.weight.dtype == torch.bfloat16 and torch.equal(model.weight, state["weight"].bfloat16())
    for asked, wanted in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        with torch.device("meta"):
            model = nn.Linear(2, 2)
        load_weights(model, state, dtype=asked)
        assert model.weight.dtype == wanted and not model.weight.is_meta


# Saving


@pytest.mark.parametrize("shard_bytes", [None, 30])
def test_a_crash_at_any_point_leaves_the_old_weights_or_the_new_or_an_error(tmp_path, shard_bytes):
    """Processes that end, without a last word, before the first, second … change of the disk. As many shards as before:
    their names are the same."""
    old, new = ({f"w{i}": torch.full((4,), value) for i in range(4)} for value in (1.0, 2.0))
    path = tmp_path / ("w.safetensors" if shard_bytes is None else "w")
    save_weights(old, path, shard_bytes=shard_bytes)
    seen = []
    for step in range(100):
        if (ended := save_and_die(new, path, shard_bytes, step)) == 0:
            break
        try:
            found = read_weights(path)
            assert same(found, old) or same(found, new), "some of each"
            seen.append("old" if same(found, old) else "new")
        except ConfigError as e:
            assert shard_bytes and "without their index" in str(e)
            seen.append("error")
        save_weights(old, path, shard_bytes=shard_bytes)
    assert ended == 0 and same(read_weights(path), new)
    assert seen == sorted(seen, key=["old", "error", "new"].index) and set(seen) == {"old", "new"} | (
        {"error"} if shard_bytes else set()
    )
    left = sorted(f.name for f in (path if shard_bytes else tmp_path).iterdir() if not f.name.startswith("."))
    assert left == (
        ["w.safetensors"]
        if shard_bytes is None
        else [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)] + [INDEX]
    )


def save_and_die(state, path, shard_bytes, step) -> int:
    """In a child that ends before its step-th change of the disk: its exit code, 0 if it had no more to do."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [step]

    def dying(function):
        def run(*args, **kwargs):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return function(*args, **kwargs)

        return run

    try:
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (weights, "save_file")):
            setattr(owner, name, dying(getattr(owner, name)))
        save_weights(state, path, shard_bytes=shard_bytes)
        os._exit(0)
    finally:
        os._exit(1)


def test_shards_are_as_large_as_asked_and_transformers_reads_them(tmp_path):
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(vocab_size=100, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2))
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "encoder.embed_tokens.weight"}
    save_weights(state, tmp_path, {"who": "us"}, shard_bytes=5000)
    model.config.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    sizes = [sum(t.nbytes for t in load_file(shard).values()) for shard in shards]
    assert len(shards) > 1 and [s for s in sizes if s > 5000] == [6400], "the embedding alone is larger than a shard"
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"format": "pt", "who": "us", "total_size": sum(sizes)} and set(
        index["weight_map"]
    ) == set(state)
    assert same(T5EncoderModel.from_pretrained(tmp_path).state_dict(), model.state_dict())
    save_weights(state, tmp_path, shard_bytes=1 << 20)
    assert [f.name for f in tmp_path.glob("model-*.safetensors")] == ["model-00001-of-00001.safetensors"], (
        "older shards are gone"
    )


def test_tensors_of_every_form_are_saved_and_others_can_read_the_file(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    state = {
        "tied": base,
        "too": base,
        "turned": base.T,
        "part": base[1:],
        "wide": torch.ones(1, 3).expand(5, 3),
        "none": torch.zeros(0, 3),
        "fp8": base.to(torch.float8_e4m3fn),
        "of a model": nn.Parameter(base.clone()),
    }
    save_weights(state, tmp_path / "new" / "w.safetensors")
    found = read_weights(tmp_path / "new" / "w.safetensors")
    assert all(
        torch.equal(found[k].float(), state[k].detach().float()) and found[k].dtype == state[k].dtype for k in state
    )
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "new" / "w.safetensors").stat().st_mode == plain.stat().st_mode


def test_what_cannot_be_saved_is_said(tmp_path):
    for path, size, words in (
        ("w.pt", None, "one file has the suffix .safetensors"),
        ("w.safetensors", 10, "shards go into a folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            save_weights(STATE, tmp_path / path, shard_bytes=size)
    with pytest.raises(ConfigError, match="1 without values .m."):
        save_weights({"m": torch.ones(2, device="meta")}, tmp_path / "w.safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(DatakitError, match="cannot write .*file/w.safetensors"):
        save_weights(STATE, tmp_path / "file" / "w.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["file"]
