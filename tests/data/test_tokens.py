"""Tokens on disk: made once, mapped afterwards, never half."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformer.data import tokens as module
from jaxformer.data.pairs import Pair, ParallelText
from jaxformer.data.tokens import TokenPairs, tokenize

ROWS = [[[7] * (i % 4), [i, i + 1]] for i in range(25)]


class Text(ParallelText):
    """Sentences of words, each word a number."""

    name = "text"

    def __init__(self, fingerprint="f", rows=ROWS):
        self.fingerprint = fingerprint
        self.pairs = [Pair(*(" ".join(map(str, side)) for side in row), "") for row in rows]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


class Numbers:
    """Reads numbers; counts how often it is asked."""

    def __init__(self, fingerprint="t", vocab_size=300):
        self.fingerprint, self.vocab_size, self.calls = fingerprint, vocab_size, 0

    def encode(self, lines):
        self.calls += 1
        return [[int(word) for word in line.split()] for line in lines]


class Meanwhile(Numbers):
    """While it reads, something else happens."""

    def __init__(self, happens):
        super().__init__()
        self.happens = happens

    def encode(self, lines):
        if self.calls == 1:
            self.happens()
        return super().encode(lines)


def content(tokens):
    return [[tokens.source(i).tolist(), tokens.target(i).tolist()] for i in range(len(tokens))]


@pytest.mark.parametrize("chunk", [7, 25, 10_000])
def test_tokens_are_made_once(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    numbers = Numbers()
    first = tokenize(Text(), numbers, tmp_path)
    assert numbers.calls == 2 * -(-25 // chunk)
    again = tokenize(Text(), Meanwhile(pytest.fail), tmp_path)
    assert content(first) == content(again) == ROWS
    assert first.fingerprint == again.fingerprint
    assert first.lengths_N2.tolist() == [[i % 4, 2] for i in range(25)]
    assert first.source(3).dtype == first.target(3).dtype == np.int32
    assert len(list(tmp_path.iterdir())) == 1


SENTENCES = st.lists(st.integers(0, 2**16 - 1), max_size=4)


@given(st.lists(st.tuples(SENTENCES, SENTENCES).map(list), min_size=1, max_size=9))
def test_tokens_in_memory_are_those_on_disk(tmp_path_factory, rows):
    on_disk = tokenize(Text(rows=rows), Numbers(), tmp_path_factory.mktemp("cache"))
    in_memory = TokenPairs.of(*zip(*rows, strict=True))
    assert content(on_disk) == content(in_memory) == rows
    np.testing.assert_array_equal(on_disk.lengths_N2, in_memory.lengths_N2)


def test_another_text_or_tokenizer_has_other_tokens(tmp_path):
    prints = {
        tokenize(Text(text), Numbers(tokenizer), tmp_path).fingerprint
        for text in "ab"
        for tokenizer in "cd"
    }
    assert len(prints) == 4
    sides = [[1, 2], [3]], [[4], []]
    assert TokenPairs.of(*sides).fingerprint == TokenPairs.of(*sides).fingerprint
    others = [[[1], [2, 3]], [[4], []]], [[[1, 2], [3]], [[5], []]], sides[::-1]
    assert len({TokenPairs.of(*other).fingerprint for other in (sides, *others)}) == 4


def test_what_a_crash_left_is_not_used(tmp_path):
    def crash():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(Text(), Meanwhile(crash), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_not_used(tmp_path):
    killed = tmp_path / "killed"

    def copy():  # of the folder as it is while the tokens are made
        (partial,) = tmp_path.iterdir()
        killed.mkdir()
        (killed / partial.name).mkdir()
        for path in partial.iterdir():
            (killed / partial.name / path.name).write_bytes(path.read_bytes())

    tokenize(Text(), Meanwhile(copy), tmp_path)
    assert list(killed.iterdir())
    assert content(tokenize(Text(), Numbers(), killed)) == ROWS


def test_of_two_processes_at_once_both_have_the_tokens(tmp_path):
    other = Meanwhile(lambda: tokenize(Text(), Numbers(), tmp_path))
    assert content(tokenize(Text(), other, tmp_path)) == ROWS
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_ids_take_two_bytes_where_they_fit(tmp_path, vocab_size, dtype):
    rows = [[[vocab_size - 1], [0]]]
    tokens = tokenize(Text(rows=rows), Numbers(vocab_size=vocab_size), tmp_path)
    assert content(tokens) == rows
    (path,) = tmp_path.rglob("target.ids.npy")
    assert np.load(path).dtype == dtype


def test_a_worker_maps_the_files_itself(tmp_path):
    rows = [[[i], [i, i]] for i in range(2000)]
    tokens = tokenize(Text(rows=rows), Numbers(vocab_size=9999), tmp_path)
    sent = pickle.dumps(tokens)
    assert len(sent) < 500
    assert content(pickle.loads(sent)) == rows
    in_memory = TokenPairs.of([[1], []], [[2, 3], [4]])
    assert content(pickle.loads(pickle.dumps(in_memory))) == [[[1], [2, 3]], [[], [4]]]
