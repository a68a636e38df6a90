"""What models put around a caption (preambles, fences, "The video shows …"), and taking it off. English only.

A repair has to leave good English: where that is not certain, the text stays and is only reported.
"""

from __future__ import annotations

import re

_FLUFF = (
    r"(?:short|brief|provided|given|following|captivating|engaging|stunning|beautiful|mesmerizing|dynamic|fascinating|"
    r"intriguing|heartwarming|entire|whole|(?:\d+|one|two|three|four|five|six|seven|eight|nine|ten)[- ]seconds?)"
)
"""Adjectives that say nothing about the content. Others ("black-and-white footage") are facts: no repair may drop
them."""
_MEDIUM = r"(?:video(?: clip| footage| sequence| segment)?|clip|footage)"
_PICTURE = rf"(?:{_MEDIUM}|images?|picture|photo(?:graph)?|scene|shot|frames?|sequence|recording|segment|visuals?)"
_SHOWS = (
    r"(?:shows?(?!\s+(?:up|off)\b)|features?(?!\s+prominently)|depicts?|captures?|presents?|displays?|showcases?|portrays?|"
    r"illustrates?|highlights?|documents?)"
)
_OPENS = (
    r"(?:(?:begins|starts|opens)(?: off)?(?: with| on| by showing)|focuses on|cent(?:er|re)s on|revolves around|is "
    r"about|"
    r"is(?=\s+an?\s+(?:[\w-]+\s+)?(?:close-up|shot|view|time-?lapse|animation|depiction)\b))"
)
_OF = rf"(?:of|showing|depicting|featuring|(?:that|which)\s+{_SHOWS}|in\s+which)"
_SENTENCE = r"(?:\A|(?<=[.!?]\s)|(?<=\n))"

_OPENINGS = tuple(
    re.compile(pattern, re.I)
    for pattern in (
        # The video shows a dog. This short clip appears to depict how a man … The video begins with a man …
        rf"\A(?:the|this)\s+(?:(?:series|sequence)\s+of\s+)?(?:{_FLUFF}\s+)*{_PICTURE}\s+(?:(?:you\s+)?(?:provided|shared)\s+)?"
        r"(?:(?:appears|seems)\s+to\s+|primarily\s+|mainly\s+)?"
        rf"(?:{_SHOWS}(?:\s+(?:us|viewers|the\s+viewer))?(?:\s+(?:that|how))?|{_OPENS}|(?:begins|starts|opens)\s+(?:as|when))\s+",
        # This is a video of a dog. It is a clip in which a dog …
        rf"\A(?:this|it)\s+is\s+an?\s+(?:{_FLUFF}\s+)*{_PICTURE}\s+{_OF}\s+",
        # A video of a dog. Footage showing a dog. (But: a clip of hair, a picture of the family on the piano)
        rf"\A(?:an?\s+)?(?:{_FLUFF}\s+)*(?:video(?:\s+clip)?|footage|image|(?<=short )clip|(?<=brief )clip)\s+{_OF}\s+",
        # From the video, we can see a dog. Based on the frames provided, it appears that a dog …
        rf"\A(?:from|based\s+on)\s+(?:the|this|these)\s+(?:{_FLUFF}\s+)*{_PICTURE}(?:\s+provided)?\s*,\s*"
        r"(?:it\s+(?:appears|seems|shows|is\s+clear)\s+(?:that|like)\s+)?",
        # At the beginning of the video, a dog …
        rf"\A(?:in|at)\s+the\s+(?:beginning|start)\s+of\s+(?:the|this)\s+{_PICTURE}\s*,\s*",
        # We can see a dog. You see how a dog …
        r"\A(?:we|you|I)\s+(?:(?:can|could)\s+)?(?:clearly\s+)?(?:see|observe|are\s+shown|are\s+presented\s+with)\s+(?:(?:that|how)\s+)?",
    )
)
_ADVERBIAL = re.compile(
    rf"{_SENTENCE}(?:in|throughout)\s+(?:the|this)\s+(?:{_FLUFF}\s+)*"
    rf"(?:{_PICTURE}\s*,\s*|{_MEDIUM}\s+(?=(?:an?|two|three|several|we|you|there)\s))",
    re.I,
)
_NOT_OPENING = re.compile(
    r"\b(?:plays|is\s+playing|hangs|appears|is\s+(?:being\s+)?(?:shown|displayed|projected|played))\b", re.I
)
"""A video that is itself part of the scene: "A video of a wedding plays on a laptop." """
_GOES_ON = re.compile(
    rf"(?:,|\band\b|\bthen\b|\bbefore\b|\bbut\b)\s*(?:(?:also|then|later|finally)\s+)*(?:{_SHOWS}|ends|concludes|transitions|cuts|shifts|"
    r"switches|pans|zooms|focuses|begins|starts|continues|reveals|moves\s+to)\b",
    re.I,
)
"""A second verb whose subject is the video: "The video shows a man and then cuts to a car." """
_BAD_START = re.compile(
    r"(?:up|of|in|on|at|from|by|to|for|and|or|is|was|are|has|with|as|what|why|whether|when|where|who|which|it|that|how)\b",
    re.I,
)
_MENTION = re.compile(
    rf"{_SENTENCE}(?:"
    rf"(?:the|this)\s+(?:{_FLUFF}\s+)*(?:{_MEDIUM}['’]s|{_PICTURE}\s+(?:(?:then|also|later|finally)\s+)?(?:{_SHOWS}|{_OPENS}))"
    rf"|(?:the|this)\s+(?:[\w-]+\s+){{1,2}}{_MEDIUM}\s+{_SHOWS}"
    r"|(?:the|this)\s+(?:video|footage)\s+(?:(?:then|also)\s+)?(?:was|has|takes|seems|appears\s+to|continues|ends|concludes|"
    r"transitions|cuts|contains|includes|provides|gives|offers|begins|starts|opens|is\s+(?!playing|displayed|shown|projected|paused))"
    rf"|as\s+the\s+{_MEDIUM}\s+(?:progresses|continues|unfolds|goes\s+on))\b"
    r"|\b(?:throughout|in|of|from|during)\s+(?:the|this)\s+(?:video|footage)(?=\s*(?:[,.;]|\Z)|\s+(?:is|are|and|with|as)\b)",
    re.I,
)
"""Words about the video that nothing here mends."""

_THOUGHTS = re.compile(r"\A(?:.*</think>|\s*<think>.*\Z)\s*", re.S)
_FENCE = re.compile(r"\A\s*```[\w-]*[ \t]*\n(.*?)\n?\s*```\s*\Z", re.S)
_TAG = re.compile(r"\A<(caption|answer|output)>\s*(.*?)\s*</\1>\Z", re.S | re.I)
_PREAMBLE = re.compile(
    r"\A(?:(?:sure|certainly|of course|okay|absolutely)\b[!,.:]*\s+)?(?:here(?:'s|’s| is| are)|below is|the "
    r"following is)\b"
    r"[^:\n]{0,100}?\b(?:captions?|descriptions?|version|rewrite|sentence|paragraph|summary|answer|response|text|log)\b"
    r"[^:\n]{0,100}(?::\s*|\n\s*)",
    re.I,
)
_SURE = re.compile(r"\A(?:sure(?: thing)?|certainly|of course|absolutely)!\s+", re.I)
_LABEL = re.compile(
    r"\A(?:\*\*)?(?:(?:(?:video|clip|image|refined|rewritten|revised|improved|final|short|dense|detailed|english|edited)\s+){0,3}"
    r"(?:caption|description|rewrite|summary)(?:\s+of\s+the\s+\w+)?|answer|output|response)\s*(?:\*\*)?\s*:\s*(?:\*\*)?\s*",
    re.I,
)
_HEADER = re.compile(r"^[ ]{0,3}(?:#{1,6}\s.*|\*\*[^*\n]{1,60}\*\*:?[ \t]*|title:.*|-{3,}|\*{3,})$\n*", re.M | re.I)
_MARK = re.compile(r"\A#{1,6}\s+([^\W\d][^\n]*)\Z|\A\*([^*\n]+)\*\Z")
_BOLD = re.compile(r"\*\*(?=\S)([^*\n]+?)(?<=\S)\*\*")
_LIST = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+\S.*\n(?:.*\n)*?\s*(?:[-*•]|\d{1,2}[.)])\s+\S", re.M)
_CLOSING = re.compile(
    r"(?:\n+|(?<=[.!?])\s+)(?:(?:please )?let me know (?:if|whether)|I hope (?:this|that)|feel free to|is there "
    r"anything else|"
    r"would you like me to)[^\n]*\Z|\n+note:[^\n]*\Z|"
    r"\s+(?:word count: ?\d+|\((?:word count: ?)?(?:about |approximately )?\d+(?: words)?\))\.?\Z",
    re.I,
)
_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "«": "»", "「": "」"}


def strip_boilerplate(text: str) -> tuple[str, bool]:
    """A caption without what a model put around it.

    Args:
        text: as the model wrote it.

    Returns:
        the text, mended where that leaves a good sentence; and whether there was (or still is) any boilerplate.
    """
    text = text.strip()
    body = _unwrap(text)
    found = body != text or bool(_LIST.search(body))
    for _ in range(4):  # openings come one after another: "In this video, we can see …"
        shorter = _without_opening(body)
        if shorter == body:
            break
        body, found = shorter, True
    return body, found or bool(_MENTION.search(body)) or _opening(body) is not None


def without_thoughts(text: str) -> str:
    """The answer of a model that thinks aloud first (`<think>…</think>`); empty when it never came to an answer."""
    return _THOUGHTS.sub("", text, count=1) if "think>" in text else text


def _unwrap(text: str) -> str:
    """Without thoughts, fences, tags, preambles, labels, Markdown, closing remarks and surrounding quotes."""
    for _ in range(4):
        before = text
        text = without_thoughts(text).strip()
        text = _FENCE.sub(r"\1", text)
        text = _TAG.sub(r"\2", text)
        for pattern in (_SURE, _PREAMBLE, _LABEL):
            text = _shortened(pattern, text)
        if "\n" in text or "#" in text:
            text = _shortened(_HEADER, text, count=0)
        text = _MARK.sub(lambda m: m[1] or m[2], _BOLD.sub(r"\1", text))
        text = _unquoted(_shortened(_CLOSING, text)).strip()
        if text == before:
            break
    return text


def _shortened(pattern: re.Pattern, text: str, count: int = 1) -> str:
    """Without the matches, unless nothing would be left."""
    shorter = pattern.sub("", text, count=count).strip()
    return shorter if re.search(r"\w", shorter) else text


def _unquoted(text: str) -> str:
    """Without a pair of quotes around the whole: not where they belong to quotations at both ends."""
    closing = _QUOTES.get(text[:1])
    if closing is None or len(text) < 3:
        return text
    body, stop = (text[:-1], text[-1]) if text[-2] == closing and text[-1] in ".," else (text, "")
    if body[-1] != closing:
        return text
    body = body[1:-1]
    inner = re.search(rf"(?<!\w){closing}|{closing}(?!\w)" if closing == "'" else closing, body)
    if inner and not (text[0] == closing and (inner.start() == 0 or body[inner.start() - 1] in " (")):
        return text
    return body if not stop or body[-1:] in ".!?," else body + stop.replace(",", "")


def _without_opening(text: str) -> str:
    """Less one opening phrase, where what remains is a sentence; else the same."""
    body = _ADVERBIAL.sub("\0", text)
    if body != text:
        return re.sub("\0(.?)", lambda m: m[1].upper(), body, flags=re.S)
    opening = _opening(text)
    rest = text[opening.end() :] if opening else ""
    return _capitalised(rest) if opening and _stands_alone(rest) else text


def _opening(text: str) -> re.Match | None:
    match = next(filter(None, (pattern.match(text) for pattern in _OPENINGS)), None)
    if match and re.match(r"an?\b|footage\b|video\b", text, re.I) and _NOT_OPENING.search(_first_sentence(text)):
        return None
    return match


def _stands_alone(rest: str) -> bool:
    first = _first_sentence(rest)
    return len(re.findall(r"\w+", first)) >= 2 and not _BAD_START.match(rest) and not _GOES_ON.search(first)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]


def _capitalised(text: str) -> str:
    """With a capital letter first, names such as iPhone aside."""
    return text if re.match(r"[a-z]\w*[A-Z]", text) else text[:1].upper() + text[1:]
