"""Tokens on disk: made once, mapped afterwards, never half."""

import pickle

import numpy as np
import pytest

from jaxformer.data.pairs import Pair, ParallelText
from jaxformer.data.tokens import TokenPairs, tokenize


class Text(ParallelText):
    """Pairs of words, each word a number."""

    name = "text"

    def __init__(self, fingerprint="f", count=25):
        self.fingerprint, self.count = fingerprint, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Pair(" ".join(["7"] * (index % 4)), f"{index} {index + 1}", "")


class Numbers:
    """Reads numbers; counts how often it is asked."""

    def __init__(self, fingerprint="t", vocab_size=300):
        self.fingerprint, self.vocab_size, self.calls = fingerprint, vocab_size, 0

    def encode(self, lines):
        self.calls += 1
        return [[int(word) for word in line.split()] for line in lines]


def content(tokens):
    sides = (tokens.source, tokens.target)
    return [[side(i).tolist() for side in sides] for i in range(len(tokens))]


WANTED = [[[7] * (i % 4), [i, i + 1]] for i in range(25)]


def test_tokens_are_made_once(tmp_path):
    numbers = Numbers()
    first = tokenize(Text(), numbers, tmp_path)
    calls = numbers.calls
    again = tokenize(Text(), numbers, tmp_path)
    assert numbers.calls == calls > 0
    assert content(first) == content(again) == WANTED
    assert first.fingerprint == again.fingerprint
    assert first.lengths_N2.tolist() == [[i % 4, 2] for i in range(25)]
    assert first.source(3).dtype == np.int32


def test_another_text_or_tokenizer_has_other_tokens(tmp_path):
    prints = {
        tokenize(Text(text), Numbers(tokenizer), tmp_path).fingerprint
        for text in "ab"
        for tokenizer in "cd"
    }
    assert len(prints) == 4


def test_what_a_crash_left_is_not_used(tmp_path):
    class Breaks(Numbers):
        def encode(self, lines):
            if self.calls:
                raise KeyboardInterrupt
            return super().encode(lines)

    with pytest.raises(KeyboardInterrupt):
        tokenize(Text(), Breaks(), tmp_path)
    assert not list(tmp_path.iterdir())
    assert content(tokenize(Text(), Numbers(), tmp_path)) == WANTED


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_ids_take_two_bytes_where_they_fit(tmp_path, vocab_size, dtype):
    tokenize(Text(), Numbers(vocab_size=vocab_size), tmp_path)
    (path,) = tmp_path.rglob("target.ids.npy")
    assert np.load(path).dtype == dtype


def test_a_worker_maps_the_files_itself(tmp_path):
    tokens = tokenize(Text(count=2000), Numbers(vocab_size=9999), tmp_path)
    sent = pickle.dumps(tokens)
    assert len(sent) < 500
    assert content(pickle.loads(sent)) == content(tokens)
    in_memory = TokenPairs.of([[1], []], [[2, 3], [4]])
    assert content(pickle.loads(pickle.dumps(in_memory))) == [[[1], [2, 3]], [[], [4]]]
