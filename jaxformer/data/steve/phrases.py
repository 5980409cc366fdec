"""Phrases: words of both languages, each word labelled with the meanings it expresses.

A word alignment is then no afterthought: a Chinese and an English word are aligned exactly if
they share a meaning. Words that express none stay unaligned: articles and `of` in English,
measure words (本, 只 …; but 杯 means `cup`) and the 的 behind an adjective in Chinese.
"""

from dataclasses import dataclass
from typing import NamedTuple

from jaxformer.data.steve.lexicon import Agreement, Noun, Person, Place


class Word(NamedTuple):
    """A word as written, and the names of the meanings it expresses."""

    text: str
    meanings: frozenset[str]


Words = tuple[Word, ...]


class Phrase(NamedTuple):
    """The two sides of one phrase, what a verb must agree with, and the head in Chinese."""

    zh: Words
    en: Words
    agreement: Agreement = "third"
    head: str = ""


@dataclass(frozen=True)
class Specifier:
    """What stands before a noun. Nothing at all gives `a house` (or `the house`: see below)."""

    demonstrative: tuple[str, str, str] | None = None
    number: tuple[str, str, int] | None = None
    ordinal: tuple[str, str] | None = None
    possessor: Person | None = None
    adjective: tuple[str, str] | None = None
    unmarked_plural: bool = False  # `他们是老师`, they are teachers: only English says it

    @property
    def is_counted(self) -> bool:
        """Whether Chinese asks for a measure word."""
        return bool(self.demonstrative or self.number or self.ordinal)

    @property
    def is_plural(self) -> bool:
        return self.unmarked_plural or (self.number is not None and self.number[2] > 1)


def word(text: str, *meanings: str) -> Word:
    """A word that expresses the given meanings."""
    return Word(text, frozenset(meanings))


def person_phrase(person: Person, role: str) -> Phrase:
    """A name or pronoun; `role` is `subject` or `object`."""
    en = person.subject if role == "subject" else person.object
    return Phrase((word(person.zh, role),), (word(en, role),), person.agreement, person.zh)


def group_phrase(noun: Noun) -> Phrase:
    """`学生们`: `the students`, as a subject. 们 is aligned to the plural noun."""
    zh = (word(noun.zh, "subject"), word("们", "subject"))
    return Phrase(zh, (word("the"), word(noun.plural, "subject")), "plural", noun.zh)


def noun_phrase(noun: Noun, role: str, spec: Specifier, *, definite: bool = False) -> Phrase:
    """A noun with its specifier. A bare noun is `a house`, `tea`; if definite, `the house`."""
    agreement: Agreement = "plural" if spec.is_plural else "third"
    zh = (*_zh_specifier(noun, role, spec), word(noun.zh, role))
    core = _en_head(noun, role, spec)
    return Phrase(
        zh, (*_en_determiner(noun, role, spec, core, definite), *core), agreement, noun.zh
    )


def place_phrase(place: Place) -> Phrase:
    """`在花园里`: `in the garden`. 在 and 里 together make the preposition."""
    zh = (word("在", "place"), *place_noun(place))
    *article, noun = place.en
    en = (word(place.preposition, "place"), *map(word, article), word(noun, "place.noun"))
    return Phrase(zh, en, head=place.zh)


def place_noun(place: Place) -> Words:
    """`花园里`, without the 在."""
    suffix = (word(place.suffix, "place"),) if place.suffix else ()
    return (word(place.zh, "place.noun"), *suffix)


def time_phrase(time: tuple[str, tuple[str, ...]]) -> Phrase:
    """`每天`: `every day`."""
    zh, en = time
    return Phrase((word(zh, "time"),), tuple(word(w, "time") for w in en), head=zh)


def _zh_specifier(noun: Noun, role: str, spec: Specifier) -> Words:
    words: list[Word] = []
    if spec.possessor:
        words += word(spec.possessor.zh, f"{role}.owner"), word("的", f"{role}.owner")
    if spec.demonstrative:
        words.append(word(spec.demonstrative[0], f"{role}.this"))
    if spec.number:
        words.append(word(spec.number[0], f"{role}.number"))
    if spec.ordinal:
        words.append(word(spec.ordinal[0], f"{role}.number"))
    if spec.is_counted:
        words.append(word(noun.measure, f"{role}.unit") if noun.is_mass else word(noun.measure))
    if spec.adjective:
        words += word(spec.adjective[0], f"{role}.adjective"), word("的")
    return tuple(words)


def _en_head(noun: Noun, role: str, spec: Specifier) -> Words:
    adjective = (word(spec.adjective[1], f"{role}.adjective"),) if spec.adjective else ()
    if not noun.is_mass:
        return (*adjective, word(noun.plural if spec.is_plural else noun.singular, role))
    unit = (word(noun.unit[spec.is_plural], f"{role}.unit"), word("of")) if spec.is_counted else ()
    return (*unit, *adjective, word(noun.singular, role))


def _en_determiner(
    noun: Noun, role: str, spec: Specifier, following: Words, definite: bool
) -> Words:
    words: list[Word] = []
    article = "an" if following[0].text[0] in "aeiou" else "a"
    if spec.possessor:
        words.append(word(spec.possessor.possessive, f"{role}.owner"))
    if spec.demonstrative:
        words.append(word(spec.demonstrative[1 + spec.is_plural], f"{role}.this"))
    if spec.ordinal:
        words += word("the"), word(spec.ordinal[1], f"{role}.number")
    if spec.number:
        words.append(word(spec.number[1] if spec.is_plural else article, f"{role}.number"))
    if not words and definite:
        words.append(word("the"))
    elif not words and not noun.is_mass and not spec.is_plural:
        words.append(word(article))
    return tuple(words)
