"""A person's own text: what is read out of files, and what is refused."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformer.data.files import MAX_CHARACTERS, read_files
from jaxformer.data.pairs import Pair
from jaxformer.errors import UserError

KEYS = ("zh", "en")
LONG = "长" * 50_000


@pytest.fixture
def write(tmp_path):
    def to(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return to


def pairs(where):
    return list(read_files(where, KEYS, "config.data.train"))


def test_tab_separated_lines_may_name_their_domain(write):
    path = write("a.tsv", "你好\thello\n 我 \tI\tsmall talk\n")
    assert pairs(path) == [Pair("你好", "hello", "a"), Pair("我", "I", "small talk")]


@pytest.mark.parametrize(
    "content",
    ["\ufeff你\tyou\n我\tI\n", "你\tyou\r\n\r\n我\tI\r\n", "你\tyou\n\n \n我\tI"],
    ids=["BOM", "CRLF", "blank lines, no last line end"],
)
def test_how_lines_end_and_files_begin_is_not_text(write, content):
    assert pairs(write("a.tsv", content)) == [Pair("你", "you", "a"), Pair("我", "I", "a")]


def test_two_files_are_read_line_by_line(write):
    where = write("x.zh", "你\n\n我\n") + "," + write("x.en", "\ufeffyou\r\n\r\nI")
    assert pairs(where) == [Pair("你", "you", "x"), Pair("我", "I", "x")]


def test_json_lines_are_read_under_the_names_of_the_config(write):
    record = {"en": "you", "zh": "你", "domain": "talk", "id": 7}
    path = write(
        "a.jsonl", json.dumps(record) + "\n" + json.dumps({"zh": "我", "en": "I", "domain": None})
    )
    assert pairs(path) == [Pair("你", "you", "talk"), Pair("我", "I", "a")]
    swapped = read_files(path, ("en", "zh"), "config.data.train")
    assert swapped[0] == Pair("you", "你", "talk")
    assert swapped.fingerprint != read_files(path, KEYS, "config.data.train").fingerprint


@given(st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["C"]))] * 2), min_size=1))
def test_whatever_text_is_written_is_read(tmp_path_factory, rows):
    rows = [(source.strip() or "空", target.strip() or "empty") for source, target in rows]
    path = tmp_path_factory.mktemp("any") / "a.tsv"
    path.write_bytes("".join(f"{source}\t{target}\n" for source, target in rows).encode())
    assert pairs(str(path)) == [Pair(*row, "a") for row in rows]


def test_a_fingerprint_is_of_the_content(write):
    texts = [
        write(name, content) for name, content in (("a", "a\tb"), ("b", "a\tb"), ("c", "a\tc"))
    ]
    prints = [read_files(path, KEYS, "config.data.train").fingerprint for path in texts]
    assert prints[0] == prints[1] != prints[2]


def test_a_line_of_50_000_characters_is_left_out_and_counted(write, caplog):
    path = write("a.tsv", f"你\tyou\n{LONG}\tlong\n我\tI\n")
    with caplog.at_level(logging.WARNING):
        assert [pair.target for pair in pairs(path)] == ["you", "I"]
    (record,) = caplog.records
    told = record.getMessage()
    assert f"1 line(s) of more than {MAX_CHARACTERS} characters" in told
    assert "the first is line 2" in told


GOOD = "你\tyou\n"
BAD = {
    "an empty file": ("a.tsv", "", r"a\.tsv \(config\.data\.train\) is empty"),
    "a BOM only": ("a.tsv", "\ufeff", r"a\.tsv holds no sentence pair"),
    "blank lines only": ("a.tsv", "\n \n", r"a\.tsv holds no sentence pair"),
    "endless lines only": ("a.tsv", f"{LONG}\tx\n", r"a\.tsv holds no sentence pair"),
    "no tab": ("a.tsv", GOOD + "no tab\n", r"a\.tsv, line 2 has 0 tabs; .*source<TAB>target"),
    "too many tabs": ("a.tsv", GOOD + "a\tb\tc\td", r"a\.tsv, line 2 has 3 tabs"),
    "an empty side": ("a.tsv", GOOD + "a\t \n", r"a\.tsv, line 2 has an empty target"),
    "not UTF-8": (
        "a.tsv",
        GOOD.encode() + "我\tI".encode("gb18030"),
        r"a\.tsv, line 2 is not UTF-8 at byte 1; convert the file, .*iconv",
    ),
    "a NUL byte": ("a.tsv", GOOD + "a\tb\0c\n", r"a\.tsv, line 2 has a NUL byte at byte 4"),
    "not JSON": ("a.jsonl", "{}x", r"a\.jsonl, line 1 is not JSON"),
    "no object": ("a.jsonl", "[1]", r'a\.jsonl, line 1 must be an object .*"zh" and "en"'),
    "a key is absent": ("a.jsonl", '{"zh": "x"}', r"a\.jsonl, line 1 must be an object"),
    "endless nesting": ("a.jsonl", "[" * 9_000, r"a\.jsonl, line 1 is not JSON"),
    "an empty text": ("a.jsonl", '{"zh": "x", "en": ""}', r"a\.jsonl, line 1 has an empty target"),
    "half a character": ("a.jsonl", '{"zh": "\\ud83d", "en": "x"}', r"line 1 .*half a character"),
    "a spelled NUL": ("a.jsonl", '{"zh": "x", "en": "\\u0000"}', r"line 1 spells a NUL"),
    "no text": ("a.jsonl", '{"zh": "x", "en": 3}', r"a\.jsonl, line 1 must be an object"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_told_with_its_place(write, case):
    name, content, words = BAD[case]
    with pytest.raises(UserError, match=words):
        pairs(write(name, content))


@pytest.mark.parametrize(
    ("sources", "targets", "words"),
    [
        ("你\n我\n", "you\n", r"x\.zh has 2 lines and .*x\.en has 1"),
        ("你\n我\n", "you\n\n", r"x\.zh, line 2 has an empty target"),
        ("你\n我\n", b"you\n\xff\n", r"x\.en, line 2 is not UTF-8 at byte 1"),
        ("你\n", "", r"x\.en \(config\.data\.train\) is empty"),
    ],
)
def test_two_files_that_do_not_go_together(write, sources, targets, words):
    where = write("x.zh", sources) + "," + write("x.en", targets)
    with pytest.raises(UserError, match=words):
        pairs(where)


@pytest.mark.parametrize("where", ["gone.tsv", ".", "tests,"])
def test_what_is_no_file_is_told_with_its_field(where):
    with pytest.raises(UserError, match=r"^config\.data\.train=.* cannot be read: .*\.$"):
        pairs(where)


def test_three_files_are_too_many():
    with pytest.raises(UserError, match="names 3 files; give one, or two by a comma"):
        pairs("a,b,c")
