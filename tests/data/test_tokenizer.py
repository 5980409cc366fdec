"""SentencePiece as this project uses it: any text comes back, and nothing else is learned."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_cases import WORDS, small, write_text

from jaxformer.config import Config
from jaxformer.data.pipeline import prepare
from jaxformer.data.tokenizer import BOS, EOS, PAD, UNK, Tokenizer
from jaxformer.errors import UserError

LINES = [
    line
    for i in range(60)
    for line in (f"史蒂夫建造第{i}座房子。", f"Steve builds house number {i}.", "你好，世界！")
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(LINES, 400)


def test_special_tokens_have_the_documented_ids(tokenizer):
    assert (PAD, UNK, BOS, EOS) == (0, 1, 2, 3)
    assert tokenizer.pieces([PAD, UNK, BOS, EOS]) == ["<pad>", "<unk>", "<s>", "</s>"]
    ids = tokenizer.encode(["Steve <s> </s> <pad>"])[0]
    assert not {PAD, UNK, BOS, EOS} & set(ids)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
def test_any_text_comes_back(tokenizer, text):
    (ids,) = tokenizer.encode([text])
    assert UNK not in ids
    words = [word for word in text.split(" ") if word]  # spaces are one space between words
    assert tokenizer.decode([ids]) == [" ".join(words)]


def test_what_stands_after_the_end_is_not_text(tokenizer):
    (ids,) = tokenizer.encode(["Steve builds"])
    assert tokenizer.decode([[BOS, *ids, EOS, *ids], [EOS], []]) == ["Steve builds", "", ""]


def test_the_same_lines_give_the_same_tokenizer(tokenizer):
    again = Tokenizer.train(LINES, 400)
    assert again.to_bytes() == tokenizer.to_bytes()
    assert Tokenizer.from_bytes(again.to_bytes()).fingerprint == tokenizer.fingerprint
    assert Tokenizer.train(LINES[:-9], 400).fingerprint != tokenizer.fingerprint


def test_text_with_little_to_offer_gives_a_smaller_vocabulary(tokenizer):
    assert 260 < tokenizer.vocab_size < 400
    assert max(id for row in tokenizer.encode(LINES) for id in row) < tokenizer.vocab_size


def test_a_vocabulary_too_small_for_the_characters_is_refused():
    with pytest.raises(
        UserError, match=r"vocab_size=261 is too small .* at least \d{3}\.$"
    ) as error:
        Tokenizer.train(LINES, 261)
    enough = int(re.findall(r"\d{3}", str(error.value))[-1])
    assert Tokenizer.train(LINES, enough).vocab_size == enough


@pytest.mark.parametrize("lines", [[], ["", ""], [" "]])
def test_no_text_gives_no_tokenizer(lines):
    with pytest.raises(UserError, match="no text to learn a vocabulary from"):
        Tokenizer.train(lines, 400)


def test_it_is_trained_once_and_on_the_training_text_only(tmp_path, monkeypatch):
    write_text(tmp_path)
    config = Config.of(small(tmp_path))
    first = prepare(config).tokenizer
    (kept,) = (tmp_path / "data").rglob("*.spm")
    assert kept.read_bytes() == first.to_bytes()

    (tmp_path / "valid.tsv").write_text("龘\tzz\n" * 50, encoding="utf-8")
    elsewhere = Config.of(small(tmp_path, data__data_dir=str(tmp_path / "elsewhere")))
    assert prepare(elsewhere).tokenizer.to_bytes() == first.to_bytes()
    pieces = first.pieces(range(first.vocab_size))
    assert set("".join([*WORDS, *WORDS.values()])) <= set(pieces)
    assert "龘" not in pieces

    larger = prepare(Config.of(small(tmp_path, data__vocab_size=301))).tokenizer
    assert larger.fingerprint != first.fingerprint
    write_text(tmp_path, lines=200)
    assert prepare(config).tokenizer.fingerprint != first.fingerprint
    write_text(tmp_path)
    monkeypatch.setattr(Tokenizer, "train", None)  # it cannot be trained again
    assert prepare(config).tokenizer.to_bytes() == first.to_bytes()
    assert prepare(config, larger).tokenizer is larger
