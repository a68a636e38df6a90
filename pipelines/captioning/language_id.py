"""Is a caption in the language that was asked for? With py3langid: offline, deterministic, 139 languages."""

from __future__ import annotations

import difflib
import importlib.util
import re
from functools import lru_cache
from typing import TYPE_CHECKING

from datakit.dependencies import install_command
from datakit.errors import ConfigError, MissingDependency

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

MIN_WORDS = 8
"""Shorter texts are not judged: names of places and dishes outweigh them."""
MIN_FOREIGN = 24
"""Weight of letters of another script in a row that make a passage: 8 Chinese or Japanese characters, 24 other
letters."""
SURE, UNLIKELY = 0.5, 0.1
"""Another language counts when it is at least this likely, and the wanted one at most that."""

_KIN = ({"zh", "yue", "wuu"}, {"no", "nn"}, {"id", "ms"}, {"bs", "hr", "sr"}, {"ar", "ary", "arz"}, {"en", "pcm"})
"""Told apart by more than short texts hold: the same for our purpose."""
_OTHER_SCRIPT = re.compile(
    "[^\\W\\d_a-zA-Z\u00aa-\u024f\u1e00-\u1eff](?:[^\\Wa-zA-Z\u00aa-\u024f\u1e00-\u1eff]|[\\s、，])*"
)
_HAN_OR_KANA = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
_WORD = re.compile(r"[^\W\d_]+")


def check_language(language: str | None) -> None:
    """Refuse, before a run, a language that could not be told.

    Raises:
        ConfigError: no such code.
        MissingDependency: py3langid is not installed.
    """
    if language is None:
        return
    if importlib.util.find_spec("py3langid") is None:
        raise MissingDependency(
            f"telling whether captions are in language {language!r} needs py3langid: {install_command('caption')} "
            "(or set the option `language` to null)"
        )
    known = _identifier().labels
    if _base(language) not in known:
        close = difflib.get_close_matches(language.lower(), known, n=1)
        raise ConfigError(
            f"no language {language!r}: "
            + (f"did you mean {close[0]}?" if close else "give an ISO 639-1 code, as en or zh")
        )


def in_other_language(text: str, wanted: str) -> bool:
    """Whether a text (without quotations), or a passage of it in another script, is in another language than wanted.

    Args:
        wanted: ISO 639-1 code; regions are ignored (`en-GB` is `en`).
    """
    words = _WORD.findall(text)
    if len(words) >= MIN_WORDS and _differs(text, wanted):
        return True
    return not text.isascii() and any(
        _weight(run) >= MIN_FOREIGN and _differs(run, wanted) for run in _OTHER_SCRIPT.findall(text)
    )


def _differs(text: str, wanted: str) -> bool:
    kin = next((group for group in _KIN if _base(wanted) in group), {_base(wanted)})
    identifier = _identifier()
    best, probability = identifier.classify(text)
    if best in kin or best == "zxx" or probability < SURE:  # zxx: no language at all, such as numbers
        return False
    return sum(p for language, p in identifier.rank(text) if language in kin) <= UNLIKELY


def _weight(run: str) -> int:
    """Letters; a character that stands for a syllable or a word counts as three."""
    return sum(map(str.isalpha, run)) + 2 * len(_HAN_OR_KANA.findall(run))


def _base(language: str) -> str:
    return re.split("[-_]", language.lower())[0]


@lru_cache(maxsize=1)
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
