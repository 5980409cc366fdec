"""The words of the grammar: data only, no rules.

English forms stand written out (irregular pasts, plurals) so that no rule has to guess them.
"""

from dataclasses import dataclass
from typing import Literal

Agreement = Literal["first", "second", "third", "plural"]
Tense = Literal["present", "past", "perfect", "progressive", "future", "ability"]


@dataclass(frozen=True)
class Person:
    """A name or a pronoun."""

    zh: str
    subject: str
    object: str
    possessive: str
    agreement: Agreement


@dataclass(frozen=True)
class Noun:
    """A noun; a mass noun has no plural and is counted, if at all, in units (a cup of tea)."""

    zh: str
    singular: str
    plural: str = ""
    measure: str = ""
    unit: tuple[str, str] = ("", "")
    adjectives: str = ""  # which of ADJECTIVES it may take, by group

    @property
    def is_mass(self) -> bool:
        return not self.plural


@dataclass(frozen=True)
class Verb:
    """A transitive verb, its five English forms, and what may stand around it."""

    zh: str
    forms: tuple[str, str, str, str, str]  # base, third person, past, participle, -ing
    objects: tuple[str, ...]  # Chinese nouns; PERSON stands for anybody
    particle: str = ""  # look *for*
    tenses: tuple[Tense, ...] = (
        "present", "past", "perfect", "progressive", "future", "ability",
    )  # fmt: skip
    places: tuple[str, ...] = ()
    negator: str = "不"  # of the present tense
    definite_object: bool = False  # "likes this cat", never "likes a cat"


@dataclass(frozen=True)
class Place:
    """A prepositional phrase: zh `在` noun suffix, en preposition (the) noun."""

    zh: str
    suffix: str
    preposition: str
    en: tuple[str, ...]


PERSON = "<person>"

NAMES = tuple(
    Person(zh, en, en, f"{en}'s", "third")
    for zh, en in (
        ("史蒂夫", "Steve"), ("玛丽", "Mary"), ("大卫", "David"), ("安娜", "Anna"), ("汤姆", "Tom"),
    )
)  # fmt: skip
PRONOUNS = (
    Person("我", "I", "me", "my", "first"),
    Person("你", "you", "you", "your", "second"),
    Person("他", "he", "him", "his", "third"),
    Person("她", "she", "her", "her", "third"),
    Person("我们", "we", "us", "our", "plural"),
    Person("他们", "they", "them", "their", "plural"),
)
PEOPLE = (
    Noun("老师", "teacher", "teachers", "个", adjectives="human"),
    Noun("医生", "doctor", "doctors", "个", adjectives="human"),
    Noun("学生", "student", "students", "个", adjectives="human"),
    Noun("农夫", "farmer", "farmers", "个", adjectives="human"),
    Noun("工程师", "engineer", "engineers", "个", adjectives="human"),
)
ANIMALS = (
    Noun("猫", "cat", "cats", "只", adjectives="animal"),
    Noun("狗", "dog", "dogs", "只", adjectives="animal"),
    Noun("鸟", "bird", "birds", "只", adjectives="animal"),
    Noun("马", "horse", "horses", "匹", adjectives="animal"),
    Noun("鱼", "fish", "fish", "条", adjectives="animal"),
)
BUILDINGS = (
    Noun("房子", "house", "houses", "座", adjectives="thing"),
    Noun("桥", "bridge", "bridges", "座", adjectives="thing"),
    Noun("塔", "tower", "towers", "座", adjectives="thing"),
)
GOODS = (
    Noun("书", "book", "books", "本", adjectives="thing"),
    Noun("小说", "novel", "novels", "本", adjectives="thing"),
    Noun("信", "letter", "letters", "封", adjectives="thing"),
    Noun("车", "car", "cars", "辆", adjectives="thing"),
    Noun("自行车", "bicycle", "bicycles", "辆", adjectives="thing"),
    Noun("椅子", "chair", "chairs", "把", adjectives="thing"),
    Noun("箱子", "box", "boxes", "个", adjectives="thing"),
    Noun("衬衫", "shirt", "shirts", "件", adjectives="thing"),
    Noun("刀", "knife", "knives", "把", adjectives="thing"),
    Noun("苹果", "apple", "apples", "个", adjectives="fruit"),
    Noun("橙子", "orange", "oranges", "个", adjectives="fruit"),
)
MASS = (
    Noun("茶", "tea", measure="杯", unit=("cup", "cups"), adjectives="food"),
    Noun("咖啡", "coffee", measure="杯", unit=("cup", "cups"), adjectives="food"),
    Noun("牛奶", "milk", measure="杯", unit=("cup", "cups"), adjectives="food"),
    Noun("米饭", "rice", measure="碗", unit=("bowl", "bowls"), adjectives="food"),
    Noun("中文", "Chinese"),
    Noun("英语", "English"),
    Noun("音乐", "music"),
)
NOUNS = {noun.zh: noun for noun in PEOPLE + ANIMALS + BUILDINGS + GOODS + MASS}

ADJECTIVES = {
    "human": (("高兴", "happy"), ("累", "tired"), ("忙", "busy"), ("年轻", "young")),
    "animal": (("大", "big"), ("小", "small"), ("白色", "white"), ("黑色", "black")),
    "thing": (
        ("大", "big"), ("小", "small"), ("新", "new"), ("旧", "old"), ("漂亮", "beautiful"),
        ("红色", "red"), ("白色", "white"), ("黑色", "black"),
    ),
    "fruit": (("大", "big"), ("小", "small"), ("新鲜", "fresh")),
    "food": (("热", "hot"), ("冷", "cold")),
    "": (),
}  # fmt: skip
COLOURS = frozenset({"红色", "白色", "黑色"})  # nouns in Chinese: they make no predicate with 很

NUMBERS = (
    ("一", "a", 1), ("两", "two", 2), ("三", "three", 3), ("四", "four", 4), ("五", "five", 5),
    ("十", "ten", 10),
)  # fmt: skip
ORDINALS = (("第一", "first"), ("第二", "second"), ("第三", "third"))
DEMONSTRATIVES = (("这", "this", "these"), ("那", "that", "those"))

GARDEN = Place("花园", "里", "in", ("the", "garden"))
PARK = Place("公园", "里", "in", ("the", "park"))
KITCHEN = Place("厨房", "里", "in", ("the", "kitchen"))
LIBRARY = Place("图书馆", "里", "in", ("the", "library"))
SCHOOL = Place("学校", "里", "in", ("the", "school"))
HOME = Place("家", "", "at", ("home",))
TABLE = Place("桌子", "上", "on", ("the", "table"))
PLACES = {p.zh: p for p in (GARDEN, PARK, KITCHEN, LIBRARY, SCHOOL, HOME, TABLE)}

TIMES: dict[Tense, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "present": (("每天", ("every", "day")),),
    "past": (("昨天", ("yesterday",)), ("上周", ("last", "week"))),
    "progressive": (("现在", ("now",)),),
    "future": (("明天", ("tomorrow",)), ("下周", ("next", "week"))),
    "perfect": (),
    "ability": (),
}


def _zh(*groups: tuple[Noun, ...]) -> tuple[str, ...]:
    return tuple(noun.zh for group in groups for noun in group)


_OUT = ("花园", "公园")
_STUDY = ("图书馆", "学校", "家", "花园", "公园")
_TABLE = ("厨房", "家", "花园", "学校")

VERBS = (
    Verb("建造", ("build", "builds", "built", "built", "building"), _zh(BUILDINGS), places=_OUT),
    Verb("读", ("read", "reads", "read", "read", "reading"), ("书", "小说", "信"), places=_STUDY),
    Verb("写", ("write", "writes", "wrote", "written", "writing"), ("书", "小说", "信"),
         places=_STUDY),
    Verb("买", ("buy", "buys", "bought", "bought", "buying"), _zh(GOODS, ANIMALS)),
    Verb("卖", ("sell", "sells", "sold", "sold", "selling"), _zh(GOODS, ANIMALS), places=_OUT),
    Verb("吃", ("eat", "eats", "ate", "eaten", "eating"), ("苹果", "橙子", "米饭", "鱼"),
         places=_TABLE),
    Verb("喝", ("drink", "drinks", "drank", "drunk", "drinking"), ("茶", "咖啡", "牛奶"),
         places=_TABLE),
    Verb("画", ("draw", "draws", "drew", "drawn", "drawing"), _zh(BUILDINGS, ANIMALS),
         places=_STUDY),
    Verb("洗", ("wash", "washes", "washed", "washed", "washing"),
         ("车", "自行车", "衬衫", "苹果", "刀", "狗", "马"), places=("花园", "家")),
    Verb("骑", ("ride", "rides", "rode", "ridden", "riding"), ("马", "自行车"), places=_OUT),
    Verb("修理", ("repair", "repairs", "repaired", "repaired", "repairing"),
         ("车", "自行车", "椅子", "箱子", "房子", "桥"), places=("花园",)),
    Verb("找", ("look", "looks", "looked", "looked", "looking"), (*_zh(GOODS, ANIMALS), PERSON),
         particle="for", places=("花园", "公园", "学校", "家")),
    Verb("看见", ("see", "sees", "saw", "seen", "seeing"),
         (*_zh(BUILDINGS, ANIMALS, GOODS), PERSON),
         tenses=("past", "perfect", "future", "ability"), places=("花园", "公园", "学校")),
    Verb("等", ("wait", "waits", "waited", "waited", "waiting"), (PERSON,), particle="for",
         tenses=("present", "past", "progressive", "future"), places=_STUDY),
    Verb("帮助", ("help", "helps", "helped", "helped", "helping"), (PERSON,), places=_STUDY),
    Verb("学习", ("study", "studies", "studied", "studied", "studying"),
         ("中文", "英语", "音乐"), places=_STUDY),
    Verb("听", ("listen", "listens", "listened", "listened", "listening"), ("音乐",),
         particle="to", places=_STUDY),
    Verb("喜欢", ("like", "likes", "liked", "liked", "liking"),
         (*_zh(BUILDINGS, ANIMALS, GOODS, MASS), PERSON), tenses=("present",),
         definite_object=True),
    Verb("认识", ("know", "knows", "knew", "known", "knowing"), (PERSON,), tenses=("present",)),
    Verb("有", ("have", "has", "had", "had", "having"), _zh(GOODS, ANIMALS),
         tenses=("present",), negator="没"),
)  # fmt: skip

# What is found on a table, and what is found in any other place: for 在 and 有 sentences.
ON_TABLE = ("书", "小说", "信", "刀", "苹果", "橙子", "茶", "咖啡", "猫")
ELSEWHERE = (*_zh(ANIMALS, PEOPLE), "车", "自行车", "椅子", "箱子")
