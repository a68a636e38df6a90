"""What came back from a language model: is it a caption, and can it be mended? Plain text, no model, no Ray.

judge(reply.text, reply.finish, prompt, "en")  ->  Judgement(text, original, flags)
repeated_texts(all captions of a catalog)      ->  those to flag `duplicate`
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl

from pipelines.captioning.boilerplate import strip_boilerplate, without_thoughts
from pipelines.captioning.language_id import in_other_language
from pipelines.captioning.prompt_templates import Prompt

FLAGS = {
    "empty": "no words",
    "refusal": "the model declines, or says that it sees nothing",
    "invalid_json": "not the JSON that the prompt's schema asks for",
    "repetition": "the model went round in circles: a phrase, sentence or value again and again",
    "language": "not in the wanted language, wholly or for a passage (quotations aside; short texts are not judged)",
    "truncated": "cut at the longest answer, or it ends in the middle of a sentence",
    "boilerplate": "words about the video, preambles, Markdown, quotes around; taken off where that leaves a good "
    "sentence",
    "length": "fewer or more words than the prompt's min_words and max_words",
    "duplicate": "the same text for clips of different videos that do not look alike",
}
"""What a caption can be flagged for, in the order in which flags are stored."""

UNUSABLE = frozenset({"empty", "refusal", "invalid_json", "repetition", "language"})
"""Flags that make a caption useless. A truncated one is not: what is there is true (cut JSON is `invalid_json`)."""

LOOPS = {1: 6, 2: 5, 3: 4}
"""Words of a phrase -> times in a row that make a loop; longer phrases: LONG_LOOP. ("up and down, up and down" is
English.)"""
LONG_LOOP = 3
COMPRESSION = 3.0
"""Length over zlib length at which a text is a loop; Whisper gives up decoding at 2.4, which long plain prose comes
near."""
REPEATED_SHARE = 0.3
"""Share of words in sentences (of at least MIN_SENTENCE words) that were there before."""
MIN_SENTENCE = 4
LONG_PROSE = 40
"""Words from which prose has to end with a full stop."""
DUPLICATE_WORDS = 8
"""Shorter texts may well be true of many clips."""


@dataclass(frozen=True)
class Judgement:
    """Attributes:
    text: to store; for a prompt with a schema the JSON, its keys in the schema's order.
    original: what the model wrote, where `text` is mended.
    flags: of FLAGS, in that order.
    """

    text: str
    original: str | None
    flags: tuple[str, ...]


def judge(text: str, finish: str, prompt: Prompt, language: str | None) -> Judgement:
    """What to think of an answer.

    Args:
        text, finish: of the `Reply`.
        prompt: that was answered.
        language: wanted (ISO 639-1, checked by `check_language`); None: any.
    """
    answer = _tidy(without_thoughts(text))
    parsed = parse_structured(text, prompt.schema)[0] if prompt.schema is not None else None
    value, found = _mended(answer if parsed is None else json.loads(parsed))  # prose is a value like any other
    strings = list(_strings(value))
    flags = {"truncated"} if finish == "length" else set()
    if strings and all(map(_NOTHING.fullmatch, strings)):
        return _judgement(text, answer, flags | {"empty"})
    if any(map(_refuses, strings)):
        return _judgement(text, answer, flags | {"refusal"})
    if prompt.schema is not None and parsed is None:
        return _judgement(text, answer, flags | {"invalid_json"} | _faults(strings, None))
    flags |= {"boilerplate"} if found else set()
    flags |= _faults(strings, language)
    if isinstance(value, str):
        return _judgement(text, value, flags | _prose_faults(value, prompt))
    return _judgement(text, _canonical(value), flags)


def parse_structured(text: str, schema: dict[str, Any]) -> tuple[str | None, str | None]:
    """The JSON object in an answer: in a code fence, in prose, or bare.

    Returns:
        its canonical text (keys in the schema's order) and None; or None and what is wrong, in one short sentence.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    text, error = without_thoughts(text), None
    decoder = json.JSONDecoder(strict=False, parse_constant=_no_constant)  # not strict: line breaks inside strings
    for start in _candidates(text):
        try:
            value, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as e:
            error = error or _syntax_error(e)
            continue
        problem = best_match(Draft202012Validator(schema).iter_errors(value))
        if problem is None:
            return _canonical(_in_order(value, schema)), None
        error = error or _schema_error(problem)
    return None, error or "there is no JSON object in the answer"


def retry_message(error: str) -> str:
    """What to tell the model about its answer, once."""
    return (
        f"This answer cannot be used: {error}. Answer the same question again, with one valid JSON object only: "
        "no text before or after it, no code fence, exactly the keys that were asked for."
    )


def repeated_texts(rows: pl.DataFrame | pl.LazyFrame, ignore: Collection[str] = ("camera",)) -> set[str]:
    """Captions that cannot be right for all the clips that have them: those to flag `duplicate`.

    A text (of 8 words and more; case, punctuation and spaces aside) of one style counts when clips of different
    videos that are not in one duplicate group have it; in style `short` when three clips of three such videos do.

    Args:
        rows: `caption_id, clip_id, video_id, duplicate_group` (null: none), `style, text` (null: none) of a catalog.
        ignore: styles whose texts are few by nature.

    Returns:
        caption_ids.
    """
    words = pl.col("text").str.to_lowercase().str.replace_all(r"[^\p{L}\p{M}\p{N}]+", " ").str.strip_chars()
    long = (
        words.str.count_matches(r"[\p{Han}\p{Hiragana}\p{Katakana}]|[^\s\p{Han}\p{Hiragana}\p{Katakana}]+")
        >= DUPLICATE_WORDS
    )
    # Any two clips share a video or a group exactly when all share one: so counting both is enough.
    unrelated = pl.min_horizontal(pl.col("video_id").n_unique(), pl.coalesce("duplicate_group", "video_id").n_unique())
    enough = pl.when(pl.col("style").first() == "short").then(3).otherwise(2)
    found = (
        rows.lazy()
        .filter(pl.col("text").is_not_null(), ~pl.col("style").is_in(list(ignore)))
        .select("caption_id", "video_id", "duplicate_group", "style", words.hash().alias("words"), long.alias("long"))
        .filter("long")
        .group_by("style", "words")
        .agg(pl.col("caption_id").filter(unrelated >= enough))
        .select(pl.col("caption_id").explode().drop_nulls())
    )
    return set(found.collect()["caption_id"])


# What is wrong with a text

_I_AM = r"(?:i'm|i am|we're|we are)"
_THING = r"(?:video|clip|image|images|picture|frames?|caption|footage|file|media|content)"
_REFUSALS = re.compile(
    r"(?:\A|(?<=[.!?]\s)|(?<=\n))[\s*]{0,3}(?:"
    + "|".join(
        (
            rf"{_I_AM}\s+(?:(?:very|really|so|truly)\s+)?(?:sorry|afraid)\b(?=[,.:;]|\s+(?:but|that|for|i|we|about|to)\b)",
            r"(?:my\s+|our\s+|i\s+)?(?:sincere\s+)?apolog(?:ies|i[sz]e)\b(?=[,.:;]|\s+(?:but|for)\b)",
            rf"(?:sorry|unfortunately)[,.:;]?\s+(?:but\s+)?(?:i|we|there\s+(?:is|was)\s+no|the\s+{_THING})\b",
            r"as\s+an?\s+(?:[\w-]+\s+){0,3}?(?:ai|language\s+model|assistant|model)\b[^.\n]{0,40}?,?\s+(?:i|my)\b",
            r"i\s+(?:can't|can\s?not|could\s?n[o']t|do\s+not|don't|did\s+not|didn't|won't|will\s+not)\s+(?:actually\s+|directly\s+)?"
            r"(?:see|view|watch|access|process|open|play|analy[sz]e|assist|help|provide|describe|generate|create|write|identify|determine|"
            r"recogni[sz]e|fulfill|comply|continue|discuss|have|know|engage|offer|find|caption|answer|share|read|rewrite)\b",
            rf"(?:error\W+)?unable\s+to\s+(?:process|view|access|describe|caption|load|open|see)\s+(?:the\s+|this\s+|your\s+)?{_THING}\b",
            rf"{_I_AM}\s+(?:just\s+|only\s+)?an?\s+(?:ai|(?:[\w-]+\s+){{0,2}}language\s+model|text-based)\b",
            rf"{_I_AM}\s+(?:unable|not\s+able|not\s+allowed|not\s+permitted)\s+to\b",
            r"i(?:'d|\s+would)\s+need\s+(?:to|the|more|a)\b|i\s+need\s+(?:to\s+see|the\s+video|more)\b",
            r"i\s+(?:must|have\s+to)\s+(?:decline|refuse)\b",
            r"[^.\n]{0,80}\bit(?:'s|\s+is)\s+(?:not\s+possible|impossible)\s+(?:for\s+me\s+)?to\s+(?:describe|caption|write|provide)\b",
            rf"(?:please|(?:could|can)\s+you(?:\s+please)?)\s+(?:provide|upload|share|attach|send|supply)\s+(?:\w+\s+){{0,3}}?"
            rf"(?:{_THING}|details|context|information|description|text)\b",
            r"(?:it\s+(?:seems|appears|looks)\s+(?:like\s+|that\s+)?)?you\s+(?:have\s?n[o']t|have\s+not|did\s?n[o']t|did\s+not|forgot\s+to)\s+"
            r"(?:provided?|attach(?:ed)?|upload(?:ed)?|shared?|give|given|included?)\b",
            rf"(?:(?:there\s+(?:is|was|are)|there's|i\s+see)\s+)?no\s+(?:\w+\s+)?{_THING}(?:\s+\w+){{0,3}}?\s+"
            r"(?:provided|attached|given|available|included|uploaded|to\s+(?:describe|caption|rewrite|see))\b",
            rf"it\s+(?:seems|appears|looks)\s+(?:like\s+|that\s+)?(?:there\s+(?:is|was)\s+)?no\s+{_THING}\b",
            rf"(?:it\s+(?:seems|appears|looks)\s+(?:like\s+|that\s+)?)?(?:the|this|your)\s+{_THING}(?:\s+you\s+\w+)?\s+"
            r"(?:(?:was|is|were|are|could|can|did|does|has)\s?(?:not|n't)|failed\s+to|cannot|can't)\s+(?:been\s+|be\s+)?"
            r"(?:provided|attached|available|load(?:ed)?|access(?:ible|ed)|displayed|play(?:ed)?|come\s+through|opened|included|"
            r"described|captioned|processed|viewed|analy[sz]ed)\b",
            rf"without\s+(?:seeing|access\s+to|being\s+able\s+to\s+see|viewing|watching)\s+(?:\w+\s+){{0,2}}?{_THING}\b[^.\n]*?\b(?:i|it)\b",
        )
    )
    + ")",
    re.I,
)
_NOTHING = re.compile(r"[\W_]*|\W*(?:n/?a|none|null|nil|no caption|unknown|undefined)\W*", re.I)
_QUOTATION = re.compile(
    r'"[^"\n]{1,300}"|“[^”\n]{1,300}”|‘[^’\n]{1,300}’(?!\w)|「[^」\n]{1,300}」|«[^»\n]{1,300}»|'
    r"(?<!\w)'(?:[^'\n]|(?<=\w)'(?=\w)){1,300}'(?!\w)"
)
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_TOKEN = re.compile(f"[{_CJK}]|[^\\W{_CJK}]+(?:['’][^\\W{_CJK}]+)*")
_SAME_CHARACTER = re.compile(r"([^\s])\1{14,}")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")
_ENDS_WELL = re.compile(r"[.!?…。！？][\"'”’」»)\]*]*\Z|[\"”’」»)\]]\Z")
_DANGLING = re.compile(r"(?:[,;–—(]|\b(?:a|an|the|and|or|of|with|his|her|their|its))\Z")


def _faults(values: list[str], language: str | None) -> set[str]:
    """Flags that texts of all kinds can get. `values`: one text, or the strings of a JSON object."""
    spoken = [_QUOTATION.sub(" ", value) for value in values]
    flags = set()
    same = max(Counter(map(_normal, spoken)).values()) if len(spoken) > 2 else 1
    if same > 2 or any(map(_goes_round, spoken)):
        flags.add("repetition")
    if language is not None and in_other_language("\n".join(spoken), language):
        flags.add("language")
    return flags


def _prose_faults(text: str, prompt: Prompt) -> set[str]:
    count = len(_TOKEN.findall(text))
    flags = set()
    if not _ENDS_WELL.search(text) and (
        (count >= LONG_PROSE and re.search(r"[.!?。]\s?\S", text)) or (count >= 6 and _DANGLING.search(text))
    ):
        flags.add("truncated")
    if not (prompt.min_words or 0) <= count <= (prompt.max_words or count):
        flags.add("length")
    return flags


def _refuses(text: str) -> bool:
    return bool(_REFUSALS.search(_QUOTATION.sub(" ", text).replace("’", "'")))


def _goes_round(text: str) -> bool:
    if _SAME_CHARACTER.search(text):
        return True
    packed = text.encode()
    if len(packed) >= 200 and len(packed) / len(zlib.compress(packed)) >= COMPRESSION:
        return True
    return _loops(_TOKEN.findall(text.lower())) or _repeats_sentences(text)


def _loops(words: list[str]) -> bool:
    """Whether a phrase of up to 40 words follows itself again and again."""
    triples = len(words) - 2
    if triples - len(set(zip(words, words[1:], words[2:]))) < 3:  # every loop has at least so many
        return False
    for period in range(1, min(40, len(words) // 3) + 1):
        run, needed = 0, period * (LOOPS.get(period, LONG_LOOP) - 1)
        for earlier, word in zip(words, words[period:]):
            run = run + 1 if earlier == word else 0
            if run >= needed:
                return True
    return False


def _repeats_sentences(text: str) -> bool:
    parts = _SENTENCE_END.split(text.lower())
    if len(set(parts)) == len(parts):
        return False
    sentences = [words for part in parts if len(words := _TOKEN.findall(part)) >= MIN_SENTENCE]
    counts = Counter(map(tuple, sentences))
    again = sum(len(words) * (times - 1) for words, times in counts.items())
    return max(counts.values(), default=0) > 2 or 0 < REPEATED_SHARE * sum(map(len, sentences)) <= again


def _normal(text: str) -> str:
    return " ".join(_TOKEN.findall(text.lower()))


def _tidy(text: str) -> str:
    """With single spaces, and at most one empty line in a row."""
    return re.sub(r"\s{2,}", lambda gap: "\n\n"[: gap[0].count("\n")] or " ", text.strip())


def _judgement(raw: str, text: str, flags: set[str]) -> Judgement:
    return Judgement(text, None if _same(text, raw) else raw, tuple(flag for flag in FLAGS if flag in flags))


def _same(text: str, raw: str) -> bool:
    """Whether they say the same: spaces and the layout of JSON do not count."""
    if text.split() == raw.split():
        return True
    try:
        return text.startswith("{") and json.loads(text) == json.loads(raw)
    except (ValueError, RecursionError):
        return False


# JSON


def _candidates(text: str) -> Iterator[int]:
    """Where a JSON object may begin; a few places, outermost first."""
    return (match.start() for match, _ in zip(re.finditer(r"\{", text), range(8)))


def _syntax_error(error: Exception) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return str(error) if isinstance(error, ValueError) else "the JSON is nested too deeply"
    near = error.doc[max(0, error.pos - 20) : error.pos + 10].replace("\n", " ").strip()
    at_end = not error.doc[error.pos :].strip() or error.msg.startswith("Unterminated")
    return "the JSON breaks off before its end" if at_end else f"the JSON is malformed near `{near}`: {error.msg}"


def _schema_error(problem: Any) -> str:
    where = ".".join(map(str, problem.absolute_path))
    if problem.validator == "required":
        missing = [key for key in problem.validator_value if key not in problem.instance]
        return f"{where or 'the object'} lacks {', '.join(missing)}"
    if problem.validator == "minLength":
        return f"{where} is too short ({problem.instance[:20]!r})"
    message = problem.message if len(problem.message) <= 160 else f"{problem.message[:60]} … {problem.message[-90:]}"
    return f"{where}: {message}" if where else message


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _in_order(value: Any, schema: dict[str, Any]) -> Any:
    """Keys as the schema lists them, then the others; strings without surrounding spaces and line breaks."""
    if isinstance(value, str):
        return " ".join(filter(None, map(str.strip, value.splitlines())))
    if isinstance(value, list):
        items = schema.get("items")
        return [_in_order(item, items if isinstance(items, dict) else {}) for item in value]
    if not isinstance(value, dict):
        return value
    inner = schema.get("properties", {})
    keys = [key for key in inner if key in value] + [key for key in value if key not in inner]
    return {key: _in_order(value[key], inner[key] if isinstance(inner.get(key), dict) else {}) for key in keys}


def _canonical(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _mended(value: Any) -> tuple[Any, bool]:
    """The same with boilerplate taken off its strings; and whether there was any."""
    if isinstance(value, str):
        return strip_boilerplate(value)
    if isinstance(value, dict):
        mended, found = _mended(list(value.values()))
        return dict(zip(value, mended)), found
    if isinstance(value, list):
        pairs = [_mended(item) for item in value]
        return [item for item, _ in pairs], any(found for _, found in pairs)
    return value, False
