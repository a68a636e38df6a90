"""Prompts: what is shipped, what files may say, what is sent."""

import json
from dataclasses import replace

import pytest

from datakit.errors import ConfigError
from pipelines.captioning.prompt_templates import FACTS, load_prompt, shipped_prompts

MIRADATA = [
    "short_caption",
    "dense_caption",
    "main_object_caption",
    "background_caption",
    "camera_caption",
    "style_caption",
]


@pytest.fixture
def write(tmp_path):
    def write(content: str, name: str = "mine.md") -> str:
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write


def test_shipped_prompts():
    assert shipped_prompts() == ["camera", "dense", "refine", "short", "structured"]
    for name in shipped_prompts():
        prompt = load_prompt(name)
        assert prompt.name == name and prompt.description and prompt.system and prompt.placeholders <= set(FACTS)
        assert (prompt.schema is not None) == (name == "structured")
    assert load_prompt("refine").placeholders == {"caption"}


def test_structured_asks_for_the_fields_of_miradata():
    prompt = load_prompt("structured")
    assert prompt.schema["required"] == MIRADATA == list(prompt.schema["properties"])
    assert all(f"- {name}:" in prompt.text and f'"{name}"' in prompt.text for name in MIRADATA)


@pytest.mark.parametrize(
    "word",
    [
        "static",
        "pan left",
        "pan right",
        "tilt up",
        "tilt down",
        "zoom in",
        "zoom out",
        "dolly in",
        "truck left",
        "pedestal up",
        "roll",
        "orbit",
        "handheld",
        "tracking",
        "close-up",
        "wide shot",
    ],
)
def test_camera_knows_the_words_of_the_trade(word):
    assert word in load_prompt("camera").text


def test_a_file_of_the_user(write):
    file = write(
        "---\nname: my-style_2\ndescription: mine\nsystem: Be brief.\nmin_words: 2\nmax_words: 9\n---\n\nWhat is "
        "this?\n"
    )
    prompt = load_prompt(file)
    assert (prompt.name, prompt.description, prompt.system) == ("my-style_2", "mine", "Be brief.")
    assert (prompt.text, prompt.schema, prompt.min_words, prompt.max_words) == ("What is this?", None, 2, 9)


def test_a_file_needs_no_front_matter(write):
    prompt = load_prompt(write("\ufeffWhat is this?\r\n\r\nBe brief.\r\n", "plain.md"))
    assert (prompt.name, prompt.text, prompt.system) == ("plain", "What is this?\n\nBe brief.", None)
    assert load_prompt(write("---\n---\nWhat?", "bare.md")).text == "What?"
    assert load_prompt(write("A line\n---\nand another", "rule.md")).text == "A line\n---\nand another"


@pytest.mark.parametrize(
    "content, message",
    [
        ("---\nname: x\nText", "front matter has no end"),
        ("---\nname: [\n---\nText", "not valid YAML"),
        ("---\n- a\n---\nText", "must map keys to values"),
        ("---\nsytem: x\n---\nText", "unknown key sytem in its front matter: did you mean system?"),
        ("---\nmin_words: many\n---\nText", "min_words: .*integer"),
        ("---\nmin_words: 9\nmax_words: 3\n---\nText", "min_words is larger"),
        ("---\nname: a b\n---\nText", "letters, digits, - and _"),
        ("---\nname: x\n---\n", "has no text"),
        ("---\nname: x\n---", "has no text"),
        ("Lasts {durration} seconds", r"no placeholder \{durration\}: did you mean \{duration\}"),
        ("Of {wombat}", r"there are \{duration\}, \{caption\}, \{camera_motion\} \(braces as text: \{\{wombat\}\}\)"),
        ("---\nschema: {type: objekt}\n---\nText", "no JSON schema: .*objekt"),
        ("---\nschema: {type: array}\n---\nText", "must have `type: object`"),
    ],
)
def test_what_is_wrong_with_a_file(write, content, message):
    with pytest.raises(ConfigError, match=message):
        load_prompt(write(content))


def test_names_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no prompt 'dens': did you mean dense"):
        load_prompt("dens")
    with pytest.raises(ConfigError, match="give a .md file or one of camera, dense, refine, short, structured"):
        load_prompt("nowhere/wombat.md")
    with pytest.raises(ConfigError, match="letters, digits"):
        load_prompt(str(tmp_path / "my style.md") if (tmp_path / "my style.md").write_text("Text") else "")
    (tmp_path / "latin.md").write_bytes("Décris".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot read prompt"):
        load_prompt(str(tmp_path / "latin.md"))


def test_render_fills_in_facts_and_leaves_out_lines_about_unknown_ones(write):
    prompt = load_prompt(
        write('First.\nIt lasts {duration} s.\nCamera: {camera_motion}.\nAs {"a": {"b": 1}} with {{duration}}.\n{ }')
    )
    assert prompt.placeholders == {"duration", "camera_motion"}
    assert prompt.render(duration=3.96, camera_motion="pan left") == (
        'First.\nIt lasts 4.0 s.\nCamera: pan left.\nAs {"a": {"b": 1}} with {duration}.\n{ }'
    )
    assert prompt.render(duration=None, caption="unused") == 'First.\nAs {"a": {"b": 1}} with {duration}.\n{ }'


def test_render_takes_a_caption_as_it_is():
    caption = "A sign reads {duration}.\nIt says {caption} and {{caption}} \\1."
    text = load_prompt("refine").render(caption=caption, duration=2.0)
    assert f"<caption>\n{caption}\n</caption>" in text
    with pytest.raises(ConfigError, match="prompt refine rewrites captions"):
        load_prompt("refine").render(duration=2.0)
    with pytest.raises(TypeError, match="no fact 'durration'"):
        load_prompt("refine").render(durration=2.0)


def test_hash_is_of_what_is_sent():
    prompt = load_prompt("structured")
    assert len(prompt.hash) == 16 and int(prompt.hash, 16) >= 0 and prompt.hash == load_prompt("structured").hash
    same = replace(prompt, name="other", description="other", min_words=3, max_words=4)
    assert same.hash == prompt.hash
    others = [
        replace(prompt, text="x"),
        replace(prompt, system="x"),
        replace(prompt, system=None),
        replace(prompt, schema=None),
    ]
    assert len({p.hash for p in (prompt, *others)}) == 5
    assert json.dumps(prompt.schema) and hash(prompt) == hash(load_prompt("structured"))
