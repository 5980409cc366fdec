"""The bilingual grammar and its tfds builder."""

import hashlib
import os
import random
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformer.data.steve import lexicon as lex
from jaxformer.data.steve import sampling
from jaxformer.data.steve.grammar import (
    WHAT,
    WHO,
    Adjuncts,
    Sentence,
    description,
    existence,
    identity,
    location,
    verb_clause,
)
from jaxformer.data.steve.phrases import (
    Specifier,
    group_phrase,
    noun_phrase,
    person_phrase,
    time_phrase,
)

ROOT = Path(__file__).parents[2]
MEASURE_WORDS = {noun.measure for noun in lex.NOUNS.values() if not noun.is_mass}

sentences = st.integers(0, 2**32).map(lambda seed: sampling.draw(random.Random(seed)))


def person(zh, role="subject"):
    return person_phrase(next(p for p in lex.NAMES + lex.PRONOUNS if p.zh == zh), role)


def thing(zh, role="object", *, definite=False, **spec):
    return noun_phrase(lex.NOUNS[zh], role, Specifier(**spec), definite=definite)


def verb(zh):
    return next(v for v in lex.VERBS if v.zh == zh)


def when(zh):
    return time_phrase(next(t for times in lex.TIMES.values() for t in times if t[0] == zh))


def number(zh):
    return next(n for n in lex.NUMBERS if n[0] == zh)


def links(sentence):
    """The alignment, readable."""
    return {f"{sentence.zh_words[i]}-{sentence.en_words[j]}" for i, j in sentence.alignment}


@cache
def many():
    """The data set and a sample beyond it."""
    rng = random.Random(1)
    chosen = [s for split in sampling.splits().values() for s in split]
    return [*chosen, *(sampling.draw(rng) for _ in range(20_000))]


STEVE, TEACHER = person("史蒂夫"), thing("老师", "subject", definite=True)
HOUSE, BOOK, RED = thing("房子"), thing("书"), ("红色", "red")
BUILD, READ = verb("建造"), verb("读")
GARDEN = Adjuncts(lex.GARDEN)

GOLDEN = [
    ("史蒂夫建造了房子", "Steve built a house",
     verb_clause(STEVE, BUILD, HOUSE, "past", "affirmative")),
    ("我们建造过房子", "We have built a house",
     verb_clause(person("我们"), BUILD, HOUSE, "perfect", "affirmative")),
    ("老师正在花园里读书", "The teacher is reading a book in the garden",
     verb_clause(TEACHER, READ, BOOK, "progressive", "affirmative", GARDEN)),
    ("明天他们会在花园里读三本书", "They will read three books in the garden tomorrow",
     verb_clause(person("他们"), READ, thing("书", number=number("三")), "future", "affirmative",
                 Adjuncts(lex.GARDEN, when("明天")))),
    ("史蒂夫昨天写了红色的书", "Steve wrote a red book yesterday",
     verb_clause(STEVE, verb("写"), thing("书", adjective=RED), "past", "affirmative",
                 Adjuncts(time=when("昨天"), after_subject=True))),
    ("她卖两把刀", "She sells two knives",
     verb_clause(person("她"), verb("卖"), thing("刀", number=number("两")), "present",
                 "affirmative")),
    ("你吃一个苹果", "You eat an apple",
     verb_clause(person("你"), verb("吃"), thing("苹果", number=number("一")), "present",
                 "affirmative")),
    ("他喜欢那两本书", "He likes those two books",
     verb_clause(person("他"), verb("喜欢"),
                 thing("书", demonstrative=lex.DEMONSTRATIVES[1], number=number("两")), "present",
                 "affirmative")),
    ("玛丽喝三杯热的茶", "Mary drinks three cups of hot tea",
     verb_clause(person("玛丽"), verb("喝"),
                 thing("茶", number=number("三"), adjective=("热", "hot")), "present",
                 "affirmative")),
    ("安娜学习第二本书", "Anna studies the second book",
     verb_clause(person("安娜"), verb("学习"), thing("书", ordinal=("第二", "second")), "present",
                 "affirmative")),
    ("学生们找史蒂夫的猫", "The students look for Steve's cat",
     verb_clause(group_phrase(lex.NOUNS["学生"]), verb("找"),
                 thing("猫", possessor=lex.NAMES[0]), "present", "affirmative")),
    ("我不认识他们", "I do not know them",
     verb_clause(person("我"), verb("认识"), person("他们", "object"), "present", "negative")),
    ("史蒂夫没有书", "Steve does not have a book",
     verb_clause(STEVE, verb("有"), BOOK, "present", "negative")),
    ("史蒂夫没有读书", "Steve did not read a book",
     verb_clause(STEVE, READ, BOOK, "past", "negative")),
    ("史蒂夫没有读过书", "Steve has not read a book",
     verb_clause(STEVE, READ, BOOK, "perfect", "negative")),
    ("史蒂夫不能读书", "Steve cannot read a book",
     verb_clause(STEVE, READ, BOOK, "ability", "negative")),
    ("史蒂夫建造房子吗？", "Does Steve build a house?",
     verb_clause(STEVE, BUILD, HOUSE, "present", "yes_no")),
    ("我正在读书吗？", "Am I reading a book?",
     verb_clause(person("我"), READ, BOOK, "progressive", "yes_no")),
    ("谁建造了房子？", "Who built a house?", verb_clause(WHO, BUILD, HOUSE, "past", "who")),
    ("老师听什么？", "What does the teacher listen to?",
     verb_clause(TEACHER, verb("听"), WHAT, "present", "what")),
    ("昨天房子很大", "The house was big yesterday",
     description(thing("房子", "subject", definite=True), ("大", "big"), "affirmative",
                 Adjuncts(time=when("昨天")), past=True)),
    ("我不累", "I am not tired",
     description(person("我"), ("累", "tired"), "negative", Adjuncts(), past=False)),
    ("史蒂夫是工程师吗？", "Is Steve an engineer?",
     identity(STEVE, thing("工程师", "complement"), "yes_no")),
    ("他们不是老师", "They are not teachers",
     identity(person("他们"), thing("老师", "complement", unmarked_plural=True), "negative")),
    ("猫在桌子上", "The cat is on the table",
     location(thing("猫", "subject", definite=True), lex.TABLE, "affirmative")),
    ("桌子上有三本书", "There are three books on the table",
     existence(lex.TABLE, thing("书", number=number("三")), "affirmative")),
    ("花园里有茶吗？", "Is there tea in the garden?", existence(lex.GARDEN, thing("茶"), "yes_no")),
]  # fmt: skip


def test_title_sentence():
    sentence = sampling.title_sentence()
    assert (sentence.zh, sentence.en) == ("史蒂夫建造房子", "Steve builds a house")
    assert sentence.zh_words == ("史蒂夫", "建造", "房子")
    assert sentence.alignment == ((0, 0), (1, 1), (2, 3))
    assert sentence in sampling.splits()["test"]


@pytest.mark.parametrize(("zh", "en", "sentence"), GOLDEN, ids=[zh for zh, _, _ in GOLDEN])
def test_golden(zh, en, sentence):
    assert (sentence.zh, sentence.en) == (zh, en)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (
            verb_clause(TEACHER, READ, BOOK, "progressive", "affirmative", GARDEN),
            "老师-teacher 正在-is 正在-in 花园-garden 里-in 读-reading 书-book",
        ),
        (
            verb_clause(STEVE, BUILD, HOUSE, "past", "affirmative"),
            "史蒂夫-Steve 建造-built 了-built 房子-house",
        ),
        (
            verb_clause(STEVE, BUILD, HOUSE, "past", "yes_no"),
            "史蒂夫-Steve 建造-build 了-Did 房子-house 吗-? ？-?",
        ),
        (
            verb_clause(STEVE, verb("找"), HOUSE, "present", "negative"),
            "史蒂夫-Steve 不-does 不-not 找-look 找-for 房子-house",
        ),
        (
            existence(lex.TABLE, thing("茶", number=number("两")), "affirmative"),
            "桌子-table 上-on 有-There 有-are 两-two 杯-cups 茶-tea",
        ),
    ],
)
def test_alignment_follows_the_documented_rule(sentence, expected):
    assert links(sentence) == set(expected.split())


@given(sentences)
def test_words_make_up_the_sentence(sentence: Sentence):
    assert "".join(sentence.zh_words) == sentence.zh
    assert " " not in sentence.zh
    assert " ".join(sentence.en_words) == sentence.en.replace("?", " ?")
    assert not any(w == "" or " " in w for w in sentence.zh_words + sentence.en_words)
    assert sentence.en[0].isupper()
    assert sentence.en.endswith("?") == sentence.zh.endswith("？")


@given(sentences)
def test_alignment_covers_all_but_function_words(sentence: Sentence):
    zh_seen, en_seen = ({pair[side] for pair in sentence.alignment} for side in (0, 1))
    assert zh_seen <= set(range(len(sentence.zh_words)))
    assert en_seen <= set(range(len(sentence.en_words)))
    assert list(sentence.alignment) == sorted(set(sentence.alignment))
    zh_loose = {w for i, w in enumerate(sentence.zh_words) if i not in zh_seen}
    en_loose = {w.lower() for j, w in enumerate(sentence.en_words) if j not in en_seen}
    assert zh_loose <= MEASURE_WORDS | {"的"}
    assert en_loose <= {"a", "an", "the", "of"}


def test_articles_fit_what_follows():
    for s in many():
        for article, following in zip(s.en_words, s.en_words[1:], strict=False):
            if article.lower() in ("a", "an"):
                assert (article.lower() == "an") == (following[0] in "aeiou")


def test_sentences_are_short():
    for s in many():
        assert 3 <= len(s.zh_words) <= 14
        assert 3 <= len(s.en_words) <= 14


def test_english_is_a_function_of_chinese():
    translation, segmentation = {}, {}
    for s in many():
        assert translation.setdefault(s.zh, s.en) == s.en
        reading = (s.zh_words, s.alignment)
        assert segmentation.setdefault(s.zh, reading) == reading


def test_sizes_and_no_duplicates():
    splits = sampling.splits()
    assert {name: len(split) for name, split in splits.items()} == sampling.SIZES
    chinese = [s.zh for split in splits.values() for s in split]
    assert len(set(chinese)) == len(chinese)


@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_held_out_compositions_are_new_but_their_words_are_not(held_out):
    train, other = sampling.splits()["train"], sampling.splits()[held_out]
    assert not {s.composition for s in train} & {s.composition for s in other}
    for side in ("zh_words", "en_words"):
        known = {w for s in train for w in getattr(s, side)}
        assert {w for s in other for w in getattr(s, side)} <= known
    domains = Counter(s.domain for s in other)
    assert all(domains[s.domain] >= 15 for s in train)


def test_every_composition_is_a_reading_of_the_words():
    for s in sampling.splits()["test"]:
        subject, predicate, complement = s.composition
        assert subject in s.zh
        assert complement in s.zh
        assert predicate in s.zh or s.domain == "description"  # 很 gives way to 不 and 吗


def test_the_same_sentences_on_every_machine():
    """If this changes the data set has changed: raise the builder's VERSION, then the number."""
    digest = hashlib.sha256(repr(sorted(sampling.splits().items())).encode()).hexdigest()
    assert digest[:16] == "ea47127ff1314a89"


READ_BACK = """
import sys
import numpy as np
from jaxformer.data.steve.sampling import splits
from jaxformer.data.steve.steve_dataset_builder import Builder

builder = Builder(data_dir=sys.argv[1])
builder.download_and_prepare()
for name, sentences in splits().items():
    source = builder.as_data_source(name)
    assert len(source) == len(sentences)
    by_zh = {s.zh: s for s in sentences}
    for i in range(len(source)):
        example = source[i]
        s = by_zh.pop(example["zh"].decode())
        assert example["en"].decode() == s.en
        assert example["domain"].decode() == s.domain
        assert tuple(w.decode() for w in example["zh_words"]) == s.zh_words
        assert tuple(w.decode() for w in example["en_words"]) == s.en_words
        assert example["alignment"].dtype == np.int32
        assert example["alignment"].shape == (len(s.alignment), 2)
        assert tuple(map(tuple, example["alignment"].tolist())) == s.alignment
    assert not by_zh
assert builder.info.name == "steve"
assert builder.info.file_format.value == "array_record"
assert "tensorflow" not in sys.modules
"""


def test_builds_and_reads_back_without_tensorflow(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", READ_BACK, tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-2000:]
