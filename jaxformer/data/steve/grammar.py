"""Clauses: how phrases are ordered in each language, and what the verb looks like.

Chinese: time subject (time) negation modal place verb aspect object 吗
English: auxiliary subject auxiliary not verb object place time

The English is determined by the Chinese. Auxiliaries follow one rule of alignment: one that has a
Chinese word of its own (正在 is, 会 will, 能 can, 过 has, 了 did, 是 is, 很 is) is aligned to that
word; one that has none (do, does; the copula where 很 is dropped) is aligned to the word that calls
for it, 不, 没, 吗 or 什么. A past tense is aligned to its 了, and 吗 to the question mark.
"""

from dataclasses import dataclass
from typing import Literal

from jaxformer.data.steve.lexicon import Agreement, Place, Tense, Verb
from jaxformer.data.steve.phrases import (
    Phrase,
    Word,
    Words,
    place_noun,
    place_phrase,
    word,
)

Mood = Literal["affirmative", "negative", "yes_no", "what", "who"]
Composition = tuple[str, str, str]  # Chinese heads of subject, predicate, complement

WHO = Phrase((word("谁", "subject"),), (word("who", "subject"),), "third", "谁")
WHAT = Phrase((word("什么", "object"),), (word("what", "object"),), "third", "什么")
UNTIMED = Phrase((), ())

_BE: dict[bool, dict[Agreement, str]] = {
    False: {"first": "am", "second": "are", "third": "is", "plural": "are"},
    True: {"first": "was", "second": "were", "third": "was", "plural": "were"},
}
_ZH_MODAL: dict[Tense, Words] = {
    "progressive": (word("正在", "progressive"),),
    "future": (word("会", "future"),),
    "ability": (word("能", "ability"),),
}
_ZH_ASPECT: dict[Tense, Words] = {
    "past": (word("了", "past"),),
    "perfect": (word("过", "perfect"),),
}
_CALLER: dict[Mood, str] = {"negative": "not", "yes_no": "ask", "what": "object"}


@dataclass(frozen=True)
class Sentence:
    """A sentence pair with its gold segmentation and word alignment."""

    zh_words: tuple[str, ...]
    en_words: tuple[str, ...]
    alignment: tuple[tuple[int, int], ...]  # (Chinese word index, English word index), sorted
    domain: str
    composition: Composition

    @property
    def zh(self) -> str:
        """The Chinese as written: without spaces."""
        return "".join(self.zh_words)

    @property
    def en(self) -> str:
        """The English as written: the question mark stands close."""
        return " ".join(self.en_words).replace(" ?", "?")


@dataclass(frozen=True)
class Adjuncts:
    """Where and when. Chinese puts the time before or, if `after_subject`, behind the subject."""

    place: Place | None = None
    time: Phrase = UNTIMED
    after_subject: bool = False


NO_ADJUNCTS = Adjuncts()


def verb_clause(
    subject: Phrase,
    verb: Verb,
    obj: Phrase,
    tense: Tense,
    mood: Mood,
    adjuncts: Adjuncts = NO_ADJUNCTS,
    domain: str = "statement",
) -> Sentence:
    """A transitive clause. `mood` who/what expects WHO/WHAT as the subject/object."""
    zh_place, en_place = _place(tense, adjuncts.place)
    predicate = (
        *zh_place,
        word(verb.zh, "verb"),
        *(() if (tense, mood) == ("past", "negative") else _ZH_ASPECT.get(tense, ())),
        *obj.zh,
    )
    negation = (_negator(verb, tense),) if mood == "negative" else ()
    zh = (*_zh_opening(subject, adjuncts), *negation, *predicate)
    auxiliary = _auxiliary(tense, mood, subject.agreement)
    particle = (word(verb.particle, "verb"),) if verb.particle else ()
    main = (_main_verb(verb, tense, subject.agreement, bool(auxiliary)), *particle)
    rest = (*main, *(() if mood == "what" else obj.en), *en_place, *adjuncts.time.en)
    fronted = obj.en if mood == "what" else ()
    en = (*fronted, *_en_order(subject, auxiliary, mood), *rest)
    return _sentence(zh, en, mood, domain, (subject.head, verb.zh, obj.head))


def description(
    subject: Phrase, adjective: tuple[str, str], mood: Mood, adjuncts: Adjuncts, past: bool
) -> Sentence:
    """`房子很大`: `The house is big`. 很 makes the predicate; 不 and 吗 do without it."""
    link = {"affirmative": (word("很", "be"),), "negative": (word("不", "not"),)}.get(mood, ())
    zh = (*_zh_opening(subject, adjuncts), *link, word(adjective[0], "adjective"))
    be = word(_BE[past][subject.agreement], _CALLER.get(mood, "be"))
    predicate = (word(adjective[1], "adjective"), *adjuncts.time.en)
    en = (*_en_order(subject, (be, *_en_not(mood)), mood), *predicate)
    return _sentence(zh, en, mood, "description", (subject.head, "很", adjective[0]))


def identity(subject: Phrase, complement: Phrase, mood: Mood) -> Sentence:
    """`史蒂夫是老师`: `Steve is a teacher`."""
    zh = (*subject.zh, *_zh_not(mood), word("是", "be"), *complement.zh)
    en = (*_en_order(subject, _be(subject, mood), mood), *complement.en)
    return _sentence(zh, en, mood, "identity", (subject.head, "是", complement.head))


def location(subject: Phrase, place: Place, mood: Mood) -> Sentence:
    """`猫在桌子上`: `The cat is on the table`. 在 is both the copula and the preposition."""
    zh = (*subject.zh, *_zh_not(mood), word("在", "be", "place"), *place_noun(place))
    en = (*_en_order(subject, _be(subject, mood), mood), *place_phrase(place).en)
    return _sentence(zh, en, mood, "location", (subject.head, "在", place.zh))


def existence(place: Place, thing: Phrase, mood: Mood) -> Sentence:
    """`桌子上有三本书`: `There are three books on the table`. 有 is `there are`."""
    zh = (*place_noun(place), word("有", "be"), *thing.zh)
    verb = (word("there", "be"), word(_BE[False][thing.agreement], "be"))
    order = verb[::-1] if mood == "yes_no" else verb
    en = (*order, *thing.en, *place_phrase(place).en)
    return _sentence(zh, en, mood, "existence", (place.zh, "有", thing.head))


def _place(tense: Tense, place: Place | None) -> tuple[Words, Words]:
    """What stands before the verb in Chinese, and the place in English."""
    modal = _ZH_MODAL.get(tense, ())
    if place is None:
        return modal, ()
    phrase = place_phrase(place)
    if tense == "progressive":  # 正在 + 在花园里 is said 正在花园里: one word does both
        return (word("正在", "progressive", "place"), *phrase.zh[1:]), phrase.en
    return (*modal, *phrase.zh), phrase.en


def _negator(verb: Verb, tense: Tense) -> Word:
    if tense == "past":  # 没有 replaces 了: it says both `did` and `not`
        return word("没有", "not", "past")
    return word(
        "没有" if tense == "perfect" else verb.negator if tense == "present" else "不", "not"
    )


def _auxiliary(tense: Tense, mood: Mood, agreement: Agreement) -> Words:
    """The English auxiliary, with its negation; empty if the main verb stands alone."""
    third = agreement == "third"
    if tense == "ability" and mood == "negative":
        return (word("cannot", "ability", "not"),)
    if tense in ("present", "past"):
        if mood not in _CALLER:
            return ()
        do = (
            word("did", "past")
            if tense == "past"
            else word("does" if third else "do", _CALLER[mood])
        )
        return (do, *_en_not(mood))
    text = {
        "perfect": "has" if third else "have",
        "progressive": _BE[False][agreement],
        "future": "will",
        "ability": "can",
    }[tense]
    return (word(text, tense), *_en_not(mood))


def _main_verb(verb: Verb, tense: Tense, agreement: Agreement, has_auxiliary: bool) -> Word:
    base, third, past, participle, gerund = verb.forms
    if tense == "perfect":
        return word(participle, "verb")
    if tense == "progressive":
        return word(gerund, "verb")
    if has_auxiliary:
        return word(base, "verb")
    if tense == "past":
        return word(past, "verb", "past")
    return word(third if agreement == "third" else base, "verb")


def _be(subject: Phrase, mood: Mood) -> Words:
    return (word(_BE[False][subject.agreement], "be"), *_en_not(mood))


def _zh_not(mood: Mood) -> Words:
    return (word("不", "not"),) if mood == "negative" else ()


def _en_not(mood: Mood) -> Words:
    return (word("not", "not"),) if mood == "negative" else ()


def _zh_opening(subject: Phrase, adjuncts: Adjuncts) -> Words:
    first, second = adjuncts.time.zh, subject.zh
    return (*second, *first) if adjuncts.after_subject else (*first, *second)


def _en_order(subject: Phrase, auxiliary: Words, mood: Mood) -> Words:
    inverted = mood in ("yes_no", "what")
    return (*auxiliary, *subject.en) if inverted else (*subject.en, *auxiliary)


def _sentence(zh: Words, en: Words, mood: Mood, domain: str, composition: Composition) -> Sentence:
    """Closes a question, capitalises, and reads the alignment off the shared meanings."""
    if mood == "yes_no":
        zh = (*zh, word("吗", "ask"))
    if mood in ("yes_no", "what", "who"):
        zh = (*zh, word("？", "mark"))
        en = (*en, word("?", "mark", *(("ask",) if mood == "yes_no" else ())))
    links = tuple(
        (i, j) for i, z in enumerate(zh) for j, e in enumerate(en) if z.meanings & e.meanings
    )
    first, *rest = (w.text for w in en)
    words = (first[0].upper() + first[1:], *rest)
    return Sentence(tuple(w.text for w in zh), words, links, domain, composition)
