"""SentencePiece as this project uses it: any text comes back, and nothing else is learned."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=40))
def test_any_text_comes_back(tokenizer, text):
    words = " ".join(text.split(" "))
    (ids,) = tokenizer.encode([words])
    assert UNK not in ids
    assert tokenizer.decode([ids]) == [" ".join(part for part in words.split(" ") if part)]


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
    with pytest.raises(UserError, match=r"vocab_size=261 is too small .* at least \d{3}\.$"):
        Tokenizer.train(LINES, 261)
