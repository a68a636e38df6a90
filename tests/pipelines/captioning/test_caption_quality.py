"""Captions, good and bad, with known answers."""

import builtins
import importlib.util
import json
import re
import time

import polars as pl
import pytest

from datakit.errors import ConfigError, MissingDependency
from pipelines.captioning.caption_quality import FLAGS, UNUSABLE, judge, parse_structured, repeated_texts, retry_message
from pipelines.captioning.language_id import check_language
from pipelines.captioning.prompt_templates import Prompt, load_prompt

PROSE = Prompt("test", "Describe.")
STRUCTURED = load_prompt("structured")

STREET = (
    "A woman with auburn hair, wearing a mustard-yellow raincoat and dark jeans, walks from left to right along a "
    "narrow cobblestone "
    "street, holding a transparent umbrella. She pauses in front of a bakery window, leans forward to look at the "
    "loaves inside, and "
    "then continues toward the camera. Two-story brick buildings with green shutters line both sides of the street, "
    "and a red bicycle "
    "leans against a lamppost. Soft, overcast daylight falls evenly on the scene, and the wet stones reflect the "
    "pale sky. The camera "
    "tracks her in a medium shot at eye level, moving slowly backward. Live action with shallow depth of field and "
    "muted, cool colors."
)

GOOD = [
    STREET,
    "A golden retriever runs along the beach and shakes off the water.",
    "Two chefs plate sushi in a Tokyo kitchen.",
    "a man riding a wave on top of a surfboard",
    "Medium shot at eye level. The camera pans left slowly.",
    "Static camera, wide shot.",
    # the words of refusals, harmless
    'A cardboard sign taped to a shop door reads "Sorry, we\'re closed" while people walk past in the rain.',
    "Sorry, the board game, lies open on a table with red, blue and yellow pieces spread around it.",
    "A child holds up a card saying \"I'm sorry, I can't come to your party\" and frowns at the camera.",
    '"I\'m sorry" is written in icing on a heart-shaped cake that a hand turns slowly on a stand.',
    "‘I’m sorry, I can’t stay,’ reads the subtitle under a man in a grey trench coat who turns toward a train.",
    "An apologetic waiter in a black vest bows to a couple and takes away two plates.",
    "As an AI-controlled drone lands on a helipad, two engineers in orange vests walk toward it.",
    "A humanoid robot, built as an assistant, hands a glass of water to an elderly man in an armchair.",
    "Without looking down, a pianist plays a fast passage while the camera circles the grand piano.",
    "There are no frames on the wall, only pale rectangles where pictures used to hang.",
    "Unfortunately placed traffic cones block a cyclist, who steps off and lifts the bicycle over them.",
    "Unable to open a jar, a boy hands it to his father, who taps the lid on the table.",
    "A note hangs on a fridge. Please provide milk, it says in red letters.",
    "It appears that the frame is not level as a car drifts across wet asphalt.",
    "Without access to a bridge, hikers wade through the river, and it rises to their knees.",
    "A teleprompter shows the words: I cannot see you. A woman reads them aloud.",
    # the words of boilerplate, as content
    "The video game character jumps over a pit, collects three coins and runs to the right past green pipes.",
    "The video game shows a health bar at the top left while a knight fights a dragon.",
    "A video editor sits in front of two monitors and drags a clip along a timeline.",
    "Video cameras on tripods stand in a row while technicians in black shirts check their cables.",
    "The video store's neon sign flickers above an empty sidewalk at night.",
    "A video of a wedding plays on a laptop while an elderly couple watches from a sofa.",
    "A picture of a family in a silver frame stands on a piano, and a cat walks past it.",
    "The clip on the rope is fastened by a climber in a yellow helmet.",
    "The image on the billboard shows a perfume bottle; taxis pass below it in heavy rain.",
    "The camera begins with a close view of the dial and pulls back to the whole clock tower.",
    "The film strip runs through an old projector, lit by a warm bulb.",
    "The scene is lit by a single candle on a wooden table; a hand turns the pages of a book.",
    "A black-and-white photograph of a soldier lies on a desk while a hand sorts letters beside it.",
    "In this corner of the workshop, a carpenter planes a plank, and shavings curl to the floor.",
    "A slow-motion video of a hummingbird hovering at a red flower.",
    "A clip of dry grass falls from her hand as she bends over the basket.",
    "The photo shows up on a phone's screen as a thumb swipes left.",
    "The image features prominently on a banner above the stage while workers set up lights.",
    "One observer in a red cap watches the birds through a telescope.",
    "The short boy shows his drawing to a teacher, who nods.",
    "In the picture on the wall, a ship sails; below it, a man shines his shoes.",
    # repeated words that are no loops
    'A choir in white robes sings "hallelujah, hallelujah, hallelujah, hallelujah, hallelujah, hallelujah, '
    'hallelujah" in a cathedral.',
    "Fans chant go, go, go while a goalkeeper places the ball and steps back.",
    "A rubber ball bounces up and down, up and down, up and down on a wooden floor.",
    "A very, very, very long train of freight cars crosses a steel bridge over a river.",
    "A man walks to the door. A woman walks to the window. A child walks to the table. They all sit down at the same "
    "time.",
    "A red car follows a blue car, the blue car follows a white car, and the white car follows a bus around a "
    "roundabout.",
    "Text on a screen counts down: 10, 9, 8, 7, 6, 5, 4, 3, 2, 1.",
    "Left, right, left, right, left, right, left, right: soldiers march past a grandstand.",
    # whole sentences, quotations at both ends, no full stop
    '"Happy Birthday" is written on a chocolate cake that stands next to a card with the name "Anna"',
    "'Welcome' is painted on the door of a blue house called 'Joe's'",
    "People dance in a hall under a sign that says “Grand Opening”",
    "A boy in a striped shirt, kneeling on the sand of a wide beach at low tide, fills a green bucket with a small "
    "shovel, turns it over, "
    "taps its bottom, lifts it and looks at the tower that remains while waves break behind him",
    "Close-up of two hands kneading dough on a floured table (flour dust hangs in the light)",
    # names and words of other languages
    'A street vendor in Mexico City hands over tacos al pastor; the sign above reads "Los mejores tacos de la '
    'ciudad, desde 1962".',
    "A red banner with the characters 恭喜发财 hangs over a doorway in Chinatown while a lion dance passes.",
    'Neon signs reading "居酒屋" and "カラオケ本舗まねきねこ新宿店" light a narrow alley at night.',
    "Mexican mariachi musicians in black charro suits play trumpets in a plaza in Guadalajara.",
    "Onion domes of Saint Basil's Cathedral on Red Square (Красная площадь) stand against a blue sky.",
]

WITHOUT = [  # (what the model wrote, what is stored)
    ("The video shows a dog running.", "A dog running."),
    (
        "The video depicts two men carrying a sofa up a narrow staircase. They stop halfway.",
        "Two men carrying a sofa up a narrow staircase. They stop halfway.",
    ),
    (
        "The video begins with a close-up of a steaming cup of coffee. A hand enters from the left.",
        "A close-up of a steaming cup of coffee. A hand enters from the left.",
    ),
    (
        "This short video clip captures the moment when a glass falls off a table.",
        "The moment when a glass falls off a table.",
    ),
    ("The video shows how a man repairs a bicycle wheel.", "A man repairs a bicycle wheel."),
    ("The footage opens as a train pulls into a snowy station.", "A train pulls into a snowy station."),
    ("The clip appears to show an iPhone on a wooden desk.", "An iPhone on a wooden desk."),
    ("The image features a small white boat on a calm lake.", "A small white boat on a calm lake."),
    (
        "In this video, a cat jumps onto a kitchen counter and sniffs a bowl.",
        "A cat jumps onto a kitchen counter and sniffs a bowl.",
    ),
    ("In the video, we can see that a girl is painting a fence.", "A girl is painting a fence."),
    ("In this video we see three kayaks drifting down a river.", "Three kayaks drifting down a river."),
    (
        "A boat drifts past. Throughout the video, the camera remains static. In the scene, fog covers the water.",
        "A boat drifts past. The camera remains static. Fog covers the water.",
    ),
    ("This is a video of a baby elephant following its mother.", "A baby elephant following its mother."),
    ("A video of a man juggling oranges in a park.", "A man juggling oranges in a park."),
    ("Footage showing several surfers waiting for a wave.", "Several surfers waiting for a wave."),
    ("From the video, we can see a squirrel climbing a tree.", "A squirrel climbing a tree."),
    ("Based on the frames provided, it appears that a squirrel climbs a tree.", "A squirrel climbs a tree."),
    ("The video you provided shows a squirrel climbing a tree.", "A squirrel climbing a tree."),
    ("The series of images depicts a squirrel climbing a tree.", "A squirrel climbing a tree."),
    (
        "The video is a close-up of a woman's hands as they knit a red scarf.",
        "A close-up of a woman's hands as they knit a red scarf.",
    ),
    ("In the beginning of the video, a man opens a door.", "A man opens a door."),
    ("A short clip of a man juggling oranges.", "A man juggling oranges."),
    ("Description of the scene: A tram turns a corner.", "A tram turns a corner."),
    ("# A tram turns a corner.", "A tram turns a corner."),
    ("*A tram turns a corner.*", "A tram turns a corner."),
    ("Title: Tram\nDescription: A tram turns a corner.", "A tram turns a corner."),
    ("Here is a caption: A tram turns a corner in the rain.", "A tram turns a corner in the rain."),
    ("Sure! Here's a detailed description of the video:\n\nThe video shows a tram in the rain.", "A tram in the rain."),
    ('Certainly! Here is the rewritten caption:\n"A tram turns a corner."', "A tram turns a corner."),
    ("**Caption:** A tram turns a corner.", "A tram turns a corner."),
    ("Refined caption: A tram turns a corner.", "A tram turns a corner."),
    ("## Video Description\n\nA tram turns a **sharp** corner.", "A tram turns a sharp corner."),
    ("```\nA tram turns a corner.\n```", "A tram turns a corner."),
    ("```markdown\n# Caption\nA tram turns a corner.\n```", "A tram turns a corner."),
    ('"A tram turns a corner."', "A tram turns a corner."),
    ("“A tram turns a corner”.", "A tram turns a corner."),
    ('"A sign that says "Sorry" hangs on a door."', 'A sign that says "Sorry" hangs on a door.'),
    ("'A man's dog sleeps.'", "A man's dog sleeps."),
    ("<caption>\nA tram turns a corner.\n</caption>", "A tram turns a corner."),
    ("A tram turns a corner.\n\nLet me know if you would like more detail!", "A tram turns a corner."),
    ("A tram turns a corner. I hope this helps!", "A tram turns a corner."),
    ("A tram turns a corner.\n\n(Word count: 5)", "A tram turns a corner."),
]

KEPT_BOILERPLATE = [  # flagged, but no repair would be good English, or it would lose a fact
    "The video shows nothing.",
    "The video shows how to fold a paper crane.",
    "The video shows a man cutting wood and then cuts to a woman who paints a fence.",
    "The black-and-white footage shows a crowd waving flags at a parade.",
    "A dog runs across a meadow. The video ends with a close view of its paws.",
    "A dog runs across a meadow. As the video progresses, the sky darkens.",
    "The animated video features a red car that drives through a city.",
    "The video's visual style is dark and grainy.",
    "The camera stays in place throughout the video.",
    "The video takes place in a kitchen with white tiles.",
    "- **Subject:** a tram\n- **Background:** a rainy street",
]

BAD = [  # (text, flags)
    ("", {"empty"}),
    (" \n", {"empty"}),
    ("...", {"empty"}),
    ("N/A", {"empty"}),
    ("```\n```", {"empty"}),
    ("<think>Let me look at the frames. First, there is", {"empty"}),
    ("I'm sorry, but I can't assist with that request.", {"refusal"}),
    ("I’m sorry, I can’t help with identifying people.", {"refusal"}),
    ("I am sorry, but no video was provided.", {"refusal"}),
    ("As an AI language model, I cannot view videos directly.", {"refusal"}),
    ("As a text-based AI assistant, I don't have the ability to see images.", {"refusal"}),
    ("I cannot see the video you are referring to.", {"refusal"}),
    ("I'm unable to view the video. Please describe it to me.", {"refusal"}),
    ("Unfortunately, I do not have access to the clip.", {"refusal"}),
    ("I apologize, but the frames are too dark for me to describe.", {"refusal"}),
    ("It seems that you haven't attached a video.", {"refusal"}),
    ("It looks like the image didn't load.", {"refusal"}),
    ("It appears there is no video to describe.", {"refusal"}),
    ("The video you mentioned could not be loaded.", {"refusal"}),
    ("Can you share more details about the clip?", {"refusal"}),
    ("Please provide the video you would like me to describe.", {"refusal"}),
    ("Could you please upload the clip again?", {"refusal"}),
    ("There is no video provided for me to describe.", {"refusal"}),
    ("No caption was given to rewrite.", {"refusal"}),
    ("Without seeing the video, it is difficult to say what happens.", {"refusal"}),
    ("I'm not able to identify the people in the video, but a man and a woman sit at a table.", {"refusal"}),
    ("A man and a woman sit at a table. I cannot identify who they are.", {"refusal"}),
    ("The provided frames are completely black, so it is not possible to describe the content.", {"refusal"}),
    ("This video cannot be described.", {"refusal"}),
    ("Error: unable to process video.", {"refusal"}),
    ("I'm just a language model, I can't see.", {"refusal"}),
    ("You haven't provided a caption. Please provide one.", {"refusal"}),
    ("\"I'm sorry, but I can't assist with that.\"", {"refusal"}),
    ("The man is walking and the man is walking and the man is walking and the man", {"repetition"}),
    ("A dog dog dog dog dog dog dog on the grass.", {"repetition"}),
    ("A field with trees, " + "trees, " * 40 + "trees", {"repetition"}),
    ("A wall of bricks!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!", {"repetition"}),
    ("The camera remains static. " * 3, {"repetition"}),
    (
        "A man sits on a bench in the park. A bird lands near him. A man sits on a bench in the park. A bird lands "
        "near him.",
        {"repetition"},
    ),
    ("\n".join(["The man is wearing a black shirt"] * 5), {"repetition"}),
    (f"{STREET}\n{STREET}", {"repetition"}),
    ("一只狗在草地上跑，一只狗在草地上跑，一只狗在草地上跑，一只狗在草地上跑。", {"repetition", "language"}),
    ("一位身穿红色外套的女子在雨夜里穿过街道，霓虹灯的倒影映在她脚边的水洼里。", {"language"}),
    ("A woman in a red coat crosses a street at night, 霓虹灯的倒影映在她脚边的水洼里。", {"language"}),
    (
        "Una mujer con un abrigo rojo cruza una calle lluviosa por la noche mientras las luces se reflejan en los "
        "charcos.",
        {"language"},
    ),
    ("Ein Mann spielt Gitarre auf einer Bühne, die von blauen Scheinwerfern beleuchtet wird.", {"language"}),
    ("Женщина в красном пальто идёт по мокрой улице ночью под зонтом.", {"language"}),
    (STREET[:-60], {"truncated"}),
    ("A boy in a striped shirt runs along a beach with a", {"truncated"}),
]


@pytest.mark.parametrize("text", GOOD)
def test_good_captions_stay_as_they_are(text):
    judgement = judge(text, "stop", PROSE, "en")
    assert (judgement.text, judgement.original, judgement.flags) == (text, None, ())


@pytest.mark.parametrize("wrote, stored", WITHOUT)
def test_boilerplate_comes_off(wrote, stored):
    judgement = judge(wrote, "stop", PROSE, "en")
    assert (judgement.text, judgement.original, judgement.flags) == (stored, wrote, ("boilerplate",))
    assert judge(stored, "stop", PROSE, "en").flags == ()


@pytest.mark.parametrize("text", KEPT_BOILERPLATE)
def test_boilerplate_that_cannot_be_mended_is_flagged(text):
    judgement = judge(text, "stop", PROSE, "en")
    assert judgement.flags == ("boilerplate",)
    assert judgement.original is None or "**" in text


@pytest.mark.parametrize("text, flags", BAD)
def test_bad_captions(text, flags):
    judgement = judge(text, "stop", PROSE, "en")
    assert set(judgement.flags) == flags
    assert list(judgement.flags) == [flag for flag in FLAGS if flag in flags]


def test_enough_known_answers():
    assert len(GOOD) + len(WITHOUT) + len(KEPT_BOILERPLATE) + len(BAD) >= 60


def test_unusable_flags_are_flags():
    assert set(FLAGS) > UNUSABLE and all(FLAGS.values())


def test_finish_length_is_truncated_whatever_the_text():
    assert judge("A dog runs.", "length", PROSE, "en").flags == ("truncated",)
    assert judge("", "length", PROSE, "en").flags == ("empty", "truncated")


def test_spaces_are_no_repair():
    judgement = judge("  A dog  runs. \n\n\n A cat\n  sleeps.\n", "stop", PROSE, "en")
    assert (judgement.text, judgement.original, judgement.flags) == ("A dog runs.\n\nA cat\nsleeps.", None, ())


def test_thoughts_are_not_part_of_the_answer():
    wrote = "<think>They want a caption. The video shows a tram. I cannot see more.</think>\n\nA tram turns a corner."
    for text in (wrote, wrote.removeprefix("<think>")):  # templates may open them in the prompt
        judgement = judge(text, "stop", PROSE, "en")
        assert (judgement.text, judgement.original, judgement.flags) == ("A tram turns a corner.", text, ())


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        " ",
        "\n",
        "'",
        '"',
        "**",
        "```\n",
        "- a\n",
        "# a\n",
        "A. ",
        "{",
        '{"a": ',
        "as a ",
        "I ",
        "in the video ",
        "<think>",
        "你",
        ". ' ",
        "the short ",
    ],
)
def test_garbage_is_judged_in_no_time(piece):
    start = time.process_time()
    for prompt in (PROSE, STRUCTURED):
        judge(piece * (12_000 // len(piece)), "length", prompt, "en")
        judge("A man. " + piece * (12_000 // len(piece)) + "x", "length", prompt, "en")
    assert time.process_time() - start < 2


def test_refused_answers_are_kept_word_for_word():
    text = "The video shows a man.\n\nI'm sorry, I can't identify him."
    judgement = judge(text, "stop", PROSE, "en")
    assert (judgement.text, judgement.original, judgement.flags) == (text, None, ("refusal",))


def test_length_is_the_prompts_affair():
    dense, short = load_prompt("dense"), load_prompt("short")
    assert judge(STREET, "stop", dense, "en").flags == ()
    assert judge("A dog runs.", "stop", dense, "en").flags == ("length",)
    assert judge(STREET, "stop", short, "en").flags == ("length",)
    assert judge("A dog runs along the beach.", "stop", short, "en").flags == ()


@pytest.mark.parametrize(
    "text, wanted, other",
    [
        ("一位身穿红色外套的女子在雨夜里穿过街道，霓虹灯的倒影映在她脚边的水洼里。", "zh", False),
        ("一位身穿红色外套的女子在雨夜里穿过街道，霓虹灯的倒影映在她脚边的水洼里。", "ja", True),
        ("赤いコートを着た女性が雨の夜に通りを歩いています。", "ja", False),
        ("Un homme joue de la guitare sur une scène éclairée par des projecteurs bleus.", "fr-CA", False),
        ("Женщина в красном пальто идёт по мокрой улице ночью под зонтом.", "ru", False),
        ("A golden retriever runs along the beach and shakes off the water.", "zh", True),
        ("Un perro corre.", "en", False),  # too short to tell
        ("Ein Mann spielt Gitarre auf einer Bühne, die von blauen Scheinwerfern beleuchtet wird.", None, False),
    ],
)
def test_language(text, wanted, other):
    assert judge(text, "stop", PROSE, wanted).flags == (("language",) if other else ())


def test_languages_are_checked_before_a_run(monkeypatch):
    for code in ("en", "EN", "zh-CN", "pt_BR", None):
        check_language(code)
    with pytest.raises(ConfigError, match="no language 'english': did you mean en|give an ISO"):
        check_language("english")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "py3langid" else find_spec(name))
    with pytest.raises(MissingDependency, match="needs py3langid: uv sync --inexact --extra caption"):
        check_language("en")
    check_language(None)


def test_any_language_needs_no_library(monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *a, **k: (
            (_ for _ in ()).throw(ImportError(name)) if name.startswith("py3langid") else real(name, *a, **k)
        ),
    )
    assert judge(STREET, "stop", PROSE, None).flags == ()


# JSON

ANSWER = {
    "short_caption": "A woman in a yellow raincoat walks down a wet street.",
    "dense_caption": "A woman in a yellow raincoat walks from left to right down a wet cobblestone street and stops "
    "at a bakery.",
    "main_object_caption": "A woman with auburn hair in a yellow raincoat, walking, then looking into a window.",
    "background_caption": "Brick houses with green shutters; a red bicycle leans against a lamppost.",
    "camera_caption": "Medium shot at eye level; the camera tracks backward slowly.",
    "style_caption": "Live action with muted, cool colors.",
}
CANONICAL = json.dumps(ANSWER)


def answer(**changes) -> str:
    return json.dumps({k: v for k, v in {**ANSWER, **changes}.items() if v is not None})


@pytest.mark.parametrize(
    "text",
    [
        CANONICAL,
        json.dumps(ANSWER, indent=4),
        json.dumps(dict(reversed(ANSWER.items()))),
        f"```json\n{CANONICAL}\n```",
        f"Here is the JSON {{as asked}}:\n\n{CANONICAL}\n\nLet me know if {{this}} helps.",
        f"<think>They want {{}} or {CANONICAL[:40]}…</think>{CANONICAL}",
        f"[{CANONICAL}]",
        CANONICAL.replace("yellow raincoat walks down", "yellow raincoat\n  walks down").replace('": "', '": "  '),
    ],
)
def test_json_is_found_and_put_in_order(text):
    assert parse_structured(text, STRUCTURED.schema) == (CANONICAL, None)
    judgement = judge(text, "stop", STRUCTURED, "en")
    assert (judgement.text, judgement.flags) == (CANONICAL, ())


@pytest.mark.parametrize(
    "text, error",
    [
        ("A woman walks down a street.", "no JSON object"),
        ("", "no JSON object"),
        (CANONICAL[:200], "breaks off before its end"),
        (CANONICAL.replace(': "A woman', ": A woman", 1), "malformed near"),
        (CANONICAL[:-1] + ",}", "malformed near"),
        ("{'short_caption': 'A woman'}", "malformed near"),
        (answer(style_caption=None, camera_caption=None), "the object lacks camera_caption, style_caption"),
        (answer(style_caption=3), "style_caption: 3 is not of type 'string'"),
        (answer(dense_caption="..."), r"dense_caption is too short \('...'\)"),
        (answer(mood="calm"), "'mood' was unexpected"),
        (CANONICAL.replace('"Live action with muted, cool colors."', "NaN"), "NaN is not JSON"),
        ('{"a":' * 5000, "nested too deeply|breaks off"),
        ("A man {" * 5000, "malformed near"),
    ],
)
def test_json_errors_are_short_and_concrete(text, error):
    value, message = parse_structured(text, STRUCTURED.schema)
    assert value is None and re.search(error, message), message
    assert len(message) < 200 and "\n" not in message and message in retry_message(message)
    if text:
        assert "invalid_json" in judge(text, "stop", STRUCTURED, "en").flags


def test_originals_of_json():
    assert judge(json.dumps(ANSWER, indent=4), "stop", STRUCTURED, "en").original is None  # says the same
    fenced = f"```json\n{CANONICAL}\n```"
    assert judge(fenced, "stop", STRUCTURED, "en").original == fenced


def test_strings_in_json_are_judged_like_captions():
    judgement = judge(answer(short_caption="The video shows a woman in a raincoat."), "stop", STRUCTURED, "en")
    assert (
        judgement.flags == ("boilerplate",) and json.loads(judgement.text)["short_caption"] == "A woman in a raincoat."
    )
    assert judge(answer(style_caption="I'm sorry, I can't see it."), "stop", STRUCTURED, "en").flags == ("refusal",)
    same = dict.fromkeys(("short_caption", "camera_caption", "style_caption"), "A woman walks.")
    assert judge(answer(**same), "stop", STRUCTURED, "en").flags == ("repetition",)
    assert (
        judge(answer(dense_caption="Una mujer con un abrigo rojo cruza una calle."), "stop", STRUCTURED, "en").flags
        == ()
    )
    spanish = {key: "Una mujer con un abrigo amarillo cruza una calle mojada por la noche " + key[:4] for key in ANSWER}
    assert judge(answer(**spanish), "stop", STRUCTURED, "en").flags == ("language",)


def test_json_without_strings():
    count = Prompt(
        "count",
        "How many?",
        schema={"type": "object", "required": ["people"], "properties": {"people": {"type": "integer"}}},
    )
    assert judge('{"people": 3}', "stop", count, "en").flags == ()


def test_json_cut_off():
    assert judge(CANONICAL[:200], "length", STRUCTURED, "en").flags == ("invalid_json", "truncated")
    assert judge("I'm sorry, I can't do that.", "stop", STRUCTURED, "en").flags == ("refusal",)


# Duplicates

LONG = "A man in a blue shirt talks to the camera."


def captions(*rows) -> pl.DataFrame:
    """Rows of (video, duplicate group, style, text); ids count from 0."""
    names = ["video_id", "duplicate_group", "style", "text"]
    frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")
    ids = pl.Series([str(i) for i in range(len(rows))])
    return frame.with_columns(ids.alias("caption_id"), ids.alias("clip_id"))


@pytest.mark.parametrize(
    "rows, found",
    [
        ([("v1", None, "dense", LONG), ("v2", None, "dense", "a MAN in a  blue shirt, talks to the camera")], "01"),
        ([("v1", None, "dense", LONG), ("v1", None, "dense", LONG)], ""),  # one video
        ([("v1", "g", "dense", LONG), ("v2", "g", "dense", LONG)], ""),  # they look alike
        ([("v1", "g", "dense", LONG), ("v2", "h", "dense", LONG)], "01"),
        ([("v1", "g", "dense", LONG), ("v2", "g", "dense", LONG), ("v3", None, "dense", LONG)], "012"),
        ([("v1", "g", "dense", LONG), ("v1", None, "dense", LONG)], ""),
        ([("v1", None, "dense", LONG), ("v2", None, "mine", LONG)], ""),  # two styles
        (
            [("v1", None, "dense", "A man talks."), ("v2", None, "dense", "A man talks.")],
            "",
        ),  # short texts are true of many clips
        ([("v1", None, "dense", None), ("v2", None, "dense", None)], ""),
        ([("v1", None, "short", LONG), ("v2", None, "short", LONG)], ""),
        ([("v1", None, "short", LONG), ("v2", None, "short", LONG), ("v3", None, "short", LONG)], "012"),
        ([("v1", None, "camera", LONG), ("v2", None, "camera", LONG)], ""),
        (
            [
                ("v1", None, "dense", "一个穿蓝衬衫的男人对着镜头说话。"),
                ("v2", None, "dense", "一个穿蓝衬衫的男人对着镜头说话"),
            ],
            "01",
        ),
        ([], ""),
    ],
)
def test_texts_that_cannot_be_right_for_all(rows, found):
    assert repeated_texts(captions(*rows)) == set(found)
    assert repeated_texts(captions(*rows).lazy()) == set(found)


def test_many_rows_are_quick():
    n = 100_000
    rows = pl.DataFrame({"row": range(n)}).select(
        caption_id=pl.col("row").cast(pl.String),
        clip_id=pl.col("row").cast(pl.String),
        video_id=(pl.col("row") // 7).cast(pl.String),
        duplicate_group=pl.lit(None, pl.String),
        style=pl.lit("dense"),
        text=pl.lit(STREET) + (pl.col("row") % (n - 1)).cast(pl.String),
    )
    start = time.process_time()
    assert repeated_texts(rows) == {"0", str(n - 1)}
    assert time.process_time() - start < 5
