"""The floor: the target of the most similar source."""

import numpy as np
import pytest

from jaxformer.data.translation_memory import nearest_targets

SOURCES = ["他去银行查账。", "这个题目很容易。", "飞机很快就到达了。", "这个题目很容易。"]
TARGETS = ["bank", "easy", "plane", "easy too"]


def test_takes_the_nearest_source_in_chinese():
    queries = ["飞机到达了吗？", "这些题目不容易", "她在银行工作"]
    assert nearest_targets(queries, SOURCES, TARGETS) == ["plane", "easy", "bank"]


def test_takes_the_nearest_source_in_english():
    sources = ["the cat sat on the mat", "a quick brown fox", "it rains again today"]
    queries = ["it rained again", "brown foxes are quick", "cats on mats"]
    assert nearest_targets(queries, sources, ["1", "2", "3"]) == ["3", "2", "1"]


def test_the_first_of_equal_sources_wins():
    assert nearest_targets(["这个题目很容易。"], SOURCES[::-1], TARGETS[::-1]) == ["easy too"]


def test_a_rare_character_counts_more_than_a_frequent_one():
    sources = ["的甲", "的丙", "的丁", "乙戊"]
    assert nearest_targets(["的乙"], sources, list("abcd")) == ["d"]


def test_a_longer_source_is_not_nearer_for_its_length():
    assert nearest_targets(["猫"], ["猫猫猫猫猫狗鸟鱼", "猫"], ["zoo", "cat"]) == ["cat"]


def test_nothing_in_common_and_an_empty_query_give_the_first():
    assert nearest_targets(["xyz", ""], SOURCES, TARGETS) == ["bank", "bank"]
    assert nearest_targets([], SOURCES, TARGETS) == []


def test_many_queries_are_answered_in_their_order():
    generator = np.random.default_rng(0)
    sources = ["".join(map(chr, generator.integers(0x4E00, 0x4F00, 12))) for _ in range(500)]
    targets = [str(i) for i in range(500)]
    order = generator.permutation(500)
    assert nearest_targets([sources[i] for i in order], sources, targets) == [
        targets[i] for i in order
    ]


def test_refuses_sides_of_different_length():
    with pytest.raises(ValueError, match="2 sources and 1 targets"):
        nearest_targets(["a"], ["a", "b"], ["A"])
    with pytest.raises(ValueError, match="0 sources"):
        nearest_targets(["a"], [], [])
