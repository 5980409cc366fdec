"""What a message catalogue or a help page needs before it is parallel text.

Rules of the thumb that separate sentences from keys, menus and code: lengths, their ratio, the
share of Chinese, and nothing that a program fills in at run time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

ENGLISH_WORDS = (4, 80)
CHINESE_PER_WORD = (0.6, 4.5)  # Chinese characters per English word
CHINESE_SHARE = 0.55  # of the characters that are not spaces

_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_TAG = re.compile(r"</?([A-Za-z_][\w-]*)(?:[ :|=][^<>]*)?/?>")
_PLACEHOLDER = re.compile(
    r"%(?:\d+\$)?[-+#0]*[\d.*]*(?:l|ll|h|z)?[a-zA-Z](?![a-zA-Z])"  # %s %d %1$s %5.2f
    r"|\{\w*\}|\$\(?[A-Za-z_]|&[A-Za-z]+;|<[A-Za-z_/][^<>]*>"
)
_CODE = re.compile(r"[=*_~#|@\\^]")
_URL = re.compile(r"https?:|www\.\w|\w\.(?:com|org|net)\b")
# A sentence ends at its mark with the closing quotes that follow; in English a new one must begin.
_CHINESE_END = re.compile(r"(?<=[。！？])(?![。！？”’」』）》\"'!?])|(?<=[。！？][”’」』）\"'])")
_ENGLISH_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')”’]))\s+(?=[\"'“‘(\[]?[A-Z0-9])")


def chinese_characters(text: str) -> int:
    """How many of the characters of `text` are Chinese."""
    return len(_CHINESE.findall(text))


def is_proportionate(zh: str, en: str, low: float, high: float) -> bool:
    """Whether `zh` has between `low` and `high` Chinese characters for each word of `en`."""
    words = len(en.split())
    return low * words <= chinese_characters(zh) <= high * words and words > 0


def is_sentence(zh: str, en: str) -> bool:
    """Whether a catalogue's pair is text to learn from, by the limits above."""
    if not ENGLISH_WORDS[0] <= len(en.split()) <= ENGLISH_WORDS[1]:
        return False
    if any(bad.search(text) for bad in (_PLACEHOLDER, _CODE, _URL) for text in (en, zh)):
        return False
    if chinese_characters(zh) < CHINESE_SHARE * len("".join(zh.split())):
        return False
    return is_proportionate(zh, en, *CHINESE_PER_WORD)


def strip_markup(text: str) -> str:
    """Takes formatting tags out and leaves in those that stand for a word, such as `<npcname>`.

    A tag formats if it has a closing partner or names a colour; any other is filled in at run
    time, and `is_sentence` refuses what still holds one.
    """
    closed = set(re.findall(r"</([A-Za-z_]\w*)>", text))

    def replace(tag: re.Match[str]) -> str:
        name = tag[1]
        formats = name in closed or name.startswith("color")
        return "" if formats else tag[0]

    return " ".join(_TAG.sub(replace, text).split())


def sentences(zh: str, en: str) -> list[tuple[str, str]]:
    """Splits both sides into sentences, or neither when the two counts differ."""
    zh_parts = [part.strip() for part in _CHINESE_END.split(zh) if part.strip()]
    en_parts = [part.strip() for part in _ENGLISH_END.split(en) if part.strip()]
    if len(zh_parts) != len(en_parts):
        return [(zh, en)]
    return list(zip(zh_parts, en_parts, strict=True))


def clean(entries: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Marked-up (zh, en) entries -> their usable sentence pairs, each one once, in order."""
    seen = set()
    for zh, en in entries:
        for pair in sentences(strip_markup(zh), strip_markup(en)):
            if pair not in seen and is_sentence(*pair):
                seen.add(pair)
                yield pair
