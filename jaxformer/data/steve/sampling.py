"""Draws sentences from the grammar, and divides them by composition into splits."""

import hashlib
import random
from collections.abc import Callable, Iterator
from functools import lru_cache

from jaxformer.data.steve import grammar
from jaxformer.data.steve import lexicon as lex
from jaxformer.data.steve.grammar import Adjuncts, Composition, Mood, Sentence
from jaxformer.data.steve.phrases import (
    Phrase,
    Specifier,
    group_phrase,
    noun_phrase,
    person_phrase,
    time_phrase,
)

SIZES = {"train": 12_000, "validation": 500, "test": 500}
MAX_WORDS = 14
# The salt is the first number that puts 史蒂夫 + 建造 + 房子 into the test split, and 15 sentences
# or more of every domain into validation and test.
SALT = 46
SEED = 20170612
_HELD_OUT_PERCENT = 5

_ALL_TENSES = ("present", "past", "perfect", "progressive", "future", "ability")
_NOT_PROGRESSIVE = ("present", "past", "perfect", "future", "ability")
_COPULA_MOODS: tuple[Mood, ...] = ("affirmative", "affirmative", "negative", "yes_no")


def split_of(composition: Composition) -> str:
    """The split that a composition belongs to: by its SHA-256, so the same on every machine."""
    key = "|".join((str(SALT), *composition))
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
    if bucket < _HELD_OUT_PERCENT:
        return "test"
    return "validation" if bucket < 2 * _HELD_OUT_PERCENT else "train"


@lru_cache(maxsize=1)
def splits() -> dict[str, tuple[Sentence, ...]]:
    """All sentences of the dataset by split: the same in every process, none twice."""
    chosen: dict[str, list[Sentence]] = {name: [] for name in SIZES}
    seen: set[str] = set()
    for sentence in _stream():
        bucket = split_of(sentence.composition)
        if sentence.zh not in seen and len(chosen[bucket]) < SIZES[bucket]:
            seen.add(sentence.zh)
            chosen[bucket].append(sentence)
        if all(len(chosen[name]) == size for name, size in SIZES.items()):
            break
    return {name: tuple(sentences) for name, sentences in chosen.items()}


def title_sentence() -> Sentence:
    """`史蒂夫建造房子`: `Steve builds a house`, the first sentence of the test split."""
    house = noun_phrase(lex.NOUNS["房子"], "object", Specifier())
    return grammar.verb_clause(
        person_phrase(lex.NAMES[0], "subject"), lex.VERBS[0], house, "present", "affirmative"
    )


def draw(rng: random.Random) -> Sentence:
    """One random sentence of at most MAX_WORDS words on either side."""
    while True:
        sentence = rng.choice(_DOMAINS)(rng)
        if max(len(sentence.zh_words), len(sentence.en_words)) <= MAX_WORDS:
            return sentence


def _stream() -> Iterator[Sentence]:
    yield title_sentence()
    rng = random.Random(SEED)
    while True:
        yield draw(rng)


def _verbal(
    domain: str, tenses: tuple[str, ...], moods: tuple[Mood, ...]
) -> Callable[[random.Random], Sentence]:
    """A function that draws a verb clause of one domain."""

    def draw_clause(rng: random.Random) -> Sentence:
        mood = rng.choice(moods)
        verb = rng.choice([v for v in lex.VERBS if _fits(v, tenses, mood)])
        tense = rng.choice([t for t in verb.tenses if t in tenses])
        subject = grammar.WHO if mood == "who" else _subject(rng)
        obj = grammar.WHAT if mood == "what" else _object(rng, verb, subject)
        adjuncts = _adjuncts(rng, verb, tense)
        return grammar.verb_clause(subject, verb, obj, tense, mood, adjuncts, domain)

    return draw_clause


def _fits(verb: lex.Verb, tenses: tuple[str, ...], mood: Mood) -> bool:
    if mood == "what" and verb.objects == (lex.PERSON,):
        return False
    return any(tense in tenses for tense in verb.tenses)


def _subject(rng: random.Random, *, definite: bool = False) -> Phrase:
    kind = rng.random()
    if kind < 0.65:
        return person_phrase(rng.choice(lex.NAMES + lex.PRONOUNS), "subject")
    noun = rng.choice(lex.PEOPLE)
    if kind < 0.73:
        return group_phrase(noun)
    number = rng.choice(lex.NUMBERS[1:]) if kind < 0.8 and not definite else None
    return noun_phrase(noun, "subject", Specifier(number=number), definite=number is None)


def _object(rng: random.Random, verb: lex.Verb, subject: Phrase) -> Phrase:
    name = rng.choice(verb.objects)
    if name == lex.PERSON:
        return _person_object(rng, subject)
    noun = lex.NOUNS[name]
    return noun_phrase(noun, "object", _specifier(rng, noun, subject.head, verb.definite_object))


def _person_object(rng: random.Random, subject: Phrase) -> Phrase:
    """Anybody but the subject: a reflexive (Steve helps himself) is another matter."""
    family = {"我": "我们", "我们": "我"}.get(subject.head)
    others = [
        p for p in lex.NAMES + lex.PRONOUNS + lex.PEOPLE if p.zh not in (subject.head, family)
    ]
    who = rng.choice(others)
    if isinstance(who, lex.Person):
        return person_phrase(who, "object")
    return noun_phrase(who, "object", Specifier(), definite=True)


def _specifier(
    rng: random.Random, noun: lex.Noun, subject: str = "", definite: bool = False
) -> Specifier:
    if noun.is_mass and not noun.measure:
        return Specifier()
    if not definite:
        kind = rng.choices(("bare", "number", "definite"), (40, 30, 30))[0]
        if kind != "definite":
            number = rng.choice(lex.NUMBERS) if kind == "number" else None
            return Specifier(number=number, adjective=_adjective(rng, noun))
    return _definite_specifier(rng, noun, subject)


def _definite_specifier(rng: random.Random, noun: lex.Noun, subject: str) -> Specifier:
    kind = rng.choice(("this", "these", "owner", "owner", "ordinal"))
    if kind == "owner":
        owners = [p for p in lex.NAMES + lex.PRONOUNS if p.zh != subject]
        return Specifier(possessor=rng.choice(owners))
    if kind == "ordinal":
        return Specifier(ordinal=rng.choice(lex.ORDINALS))
    number = rng.choice(lex.NUMBERS[1:]) if kind == "these" else None
    adjective = _adjective(rng, noun) if kind == "this" else None
    return Specifier(rng.choice(lex.DEMONSTRATIVES), number=number, adjective=adjective)


def _adjective(rng: random.Random, noun: lex.Noun) -> tuple[str, str] | None:
    options = lex.ADJECTIVES[noun.adjectives]
    return rng.choice(options) if options and rng.random() < 0.35 else None


def _adjuncts(rng: random.Random, verb: lex.Verb, tense: lex.Tense) -> Adjuncts:
    """No time beside a verb of state, and no place where the verb names none."""
    place = lex.PLACES[rng.choice(verb.places)] if verb.places and rng.random() < 0.3 else None
    times = () if verb.tenses == ("present",) else lex.TIMES[tense]
    if not times or rng.random() < 0.6:
        return Adjuncts(place)
    return Adjuncts(place, time_phrase(rng.choice(times)), rng.random() < 0.5)


def _description(rng: random.Random) -> Sentence:
    mood = rng.choice(_COPULA_MOODS)
    human = rng.random() < 0.5
    noun = rng.choice([n for n in lex.NOUNS.values() if lex.ADJECTIVES[n.adjectives]])
    subject = _subject(rng, definite=True) if human else _definite_subject(rng, noun)
    group = "human" if human else noun.adjectives
    adjective = rng.choice([a for a in lex.ADJECTIVES[group] if a[0] not in lex.COLOURS])
    tense: lex.Tense | None = rng.choice((None, None, None, "past", "progressive"))
    if tense is None:
        return grammar.description(subject, adjective, mood, grammar.NO_ADJUNCTS, False)
    time = time_phrase(rng.choice(lex.TIMES[tense]))
    adjuncts = Adjuncts(None, time, rng.random() < 0.5)
    return grammar.description(subject, adjective, mood, adjuncts, tense == "past")


def _definite_subject(rng: random.Random, noun: lex.Noun) -> Phrase:
    if rng.random() < 0.3:
        return noun_phrase(noun, "subject", Specifier(), definite=True)
    return noun_phrase(noun, "subject", _definite_specifier(rng, noun, ""))


def _identity(rng: random.Random) -> Sentence:
    person, noun = rng.choice(lex.NAMES + lex.PRONOUNS), rng.choice(lex.PEOPLE)
    subject = person_phrase(person, "subject")
    plural = subject.agreement == "plural"
    spec = Specifier(adjective=_adjective(rng, noun), unmarked_plural=plural)
    complement = noun_phrase(noun, "complement", spec)
    return grammar.identity(subject, complement, rng.choice(_COPULA_MOODS))


def _location(rng: random.Random) -> Sentence:
    place, noun = _place_and_noun(rng)
    subject = _definite_subject(rng, noun)
    if place is not lex.TABLE and rng.random() < 0.5:
        subject = _subject(rng, definite=True)
    return grammar.location(subject, place, rng.choice(_COPULA_MOODS))


def _existence(rng: random.Random) -> Sentence:
    place, noun = _place_and_noun(rng)
    number = rng.choice(lex.NUMBERS) if rng.random() < 0.7 else None
    spec = Specifier(number=number, adjective=_adjective(rng, noun))
    mood: Mood = rng.choice(("affirmative", "affirmative", "yes_no"))
    return grammar.existence(place, noun_phrase(noun, "object", spec), mood)


def _place_and_noun(rng: random.Random) -> tuple[lex.Place, lex.Noun]:
    place = rng.choice([p for p in lex.PLACES.values() if p.suffix])
    names = lex.ON_TABLE if place is lex.TABLE else lex.ELSEWHERE
    return place, lex.NOUNS[rng.choice(names)]


_DOMAINS: tuple[Callable[[random.Random], Sentence], ...] = (
    _verbal("statement", ("present",), ("affirmative",)),
    _verbal("past", ("past",), ("affirmative",)),
    _verbal("perfect", ("perfect",), ("affirmative",)),
    _verbal("progressive", ("progressive",), ("affirmative",)),
    _verbal("modal", ("future", "ability"), ("affirmative",)),
    _verbal("negation", _NOT_PROGRESSIVE, ("negative",)),
    _verbal("question", _ALL_TENSES, ("yes_no",)),
    _verbal("wh_question", _ALL_TENSES, ("what", "who")),
    _description,
    _identity,
    _location,
    _existence,
)
