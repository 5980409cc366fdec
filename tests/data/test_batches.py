"""Batches: pure in the step, exact in what they hold, prepared ahead without residue."""

import contextlib
import multiprocessing
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.data.batches import Batches, PackedRows, eval_batches, prefetch
from jaxformer.data.packing import Packing
from jaxformer.data.tokens import TokenPairs
from jaxformer.errors import UserError


def numbered(pairs: int, seed: int = 0) -> TokenPairs:
    """Pairs of random lengths whose tokens tell which pair they are of."""
    lengths = np.random.default_rng(seed).integers(0, 12, (pairs, 2))
    return TokenPairs.of(
        [[1000 + i] * s for i, (s, _) in enumerate(lengths)],
        [[5000 + i] * t for i, (_, t) in enumerate(lengths)],
    )


def batches(pairs: int = 60, seed: int = 3, rows: int = 4, **changed) -> Batches:
    shape = {"source_length": 24, "target_length": 32} | changed
    return Batches(numbered(pairs), seed=seed, rows=rows, **shape)


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


def ids_in(made: PackedRows, steps) -> list[int]:
    return [i for step in steps for row in made.example_ids_at(step) for i in row.tolist()]


def test_a_small_batch_by_hand():
    tokens = TokenPairs.of([[11, 12], [21], []], [[31], [41, 42, 43], [51, 52]])
    made = eval_batches(tokens, 3, 6, 7)
    # Rows (pair 2, pair 0) and (pair 1), whatever the packing makes of them.
    order, starts = np.array([2, 0, 1]), np.array([0, 2, 3])
    made.packing = Packing(order, starts, np.empty(0, np.int64), (6, 7), (6, 9))
    batch = made.batch_at(0)
    expected = {
        "source_BS": [[3, 11, 12, 3, 0, 0], [21, 3, 0, 0, 0, 0], [0] * 6],
        "source_segments_BS": [[1, 2, 2, 2, 0, 0], [1, 1, 0, 0, 0, 0], [0] * 6],
        "source_positions_BS": [[0, 0, 1, 2, 0, 0], [0, 1, 0, 0, 0, 0], [0] * 6],
        "inputs_BT": [[2, 51, 52, 2, 31, 0, 0], [2, 41, 42, 43, 0, 0, 0], [0] * 7],
        "targets_BT": [[51, 52, 3, 31, 3, 0, 0], [41, 42, 43, 3, 0, 0, 0], [0] * 7],
        "target_segments_BT": [[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 0, 0, 0], [0] * 7],
        "target_positions_BT": [[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 0, 0, 0], [0] * 7],
    }
    assert list(batch) == list(expected)
    assert all(rows.dtype == np.int32 for rows in batch.values())
    assert {name: rows.tolist() for name, rows in batch.items()} == expected
    assert [row.tolist() for row in made.example_ids_at(0)] == [[2, 0], [1], []]


def test_arrays_hold_the_pairs_that_example_ids_name():
    made = batches()
    for step in range(20):
        batch = made.batch_at(step)
        for row, ids in enumerate(made.example_ids_at(step)):
            for segment, i in enumerate(ids.tolist(), start=1):
                source = batch["source_BS"][row][batch["source_segments_BS"][row] == segment]
                target = batch["targets_BT"][row][batch["target_segments_BT"][row] == segment]
                assert source.tolist() == [*made.tokens.source(i), 3]
                assert target.tolist() == [*made.tokens.target(i), 3]


@pytest.mark.parametrize("step", [0, 7, 10**9])
def test_a_batch_depends_on_nothing_but_data_seed_and_step(step):
    used = batches()
    for other in range(30):
        used.batch_at(other)
    assert_same(used.batch_at(step), batches().batch_at(step))
    assert not same(used.batch_at(step), batches(seed=4).batch_at(step))
    assert not same(used.batch_at(step), used.batch_at(step + 1))


@settings(max_examples=30)
@given(
    st.integers(0, 1000), st.slices(6), st.integers(6, 80).map(lambda pairs: batches(pairs, rows=6))
)
def test_a_host_computes_its_rows_of_the_global_batch(step, rows, made):
    whole = made.batch_at(step)
    assert_same(made.batch_at(step, rows), {name: array[rows] for name, array in whole.items()})


@pytest.mark.parametrize("pairs", [1, 3, 60, 200])  # from less than a batch to many batches
def test_every_epoch_sees_every_pair_once(pairs):
    made = batches(pairs, rows=5)
    epoch = made.packing.rows
    stream = [tuple(row) for step in range(epoch) for row in made.example_ids_at(step)]
    epochs = [stream[start : start + epoch] for start in range(0, len(stream), epoch)]
    assert len(epochs) == 5
    for rows in epochs:
        assert sorted(i for row in rows for i in row) == list(range(pairs))
    assert made.steps_per_epoch == epoch / 5
    if pairs >= 60:
        assert len({tuple(rows) for rows in epochs}) == 5  # each in an order of its own


def test_evaluation_sees_every_pair_once_in_a_fixed_order():
    tokens = numbered(61)
    made = eval_batches(tokens, 4, 24, 32)
    assert made.packing.rows % 4  # the last batch is not full
    assert sorted(ids_in(made, range(len(made)))) == list(range(61))
    found = list(made)
    assert len(found) == len(made)
    assert all(batch["inputs_BT"].shape == (4, 32) for batch in found)
    empty = -made.packing.rows % 4
    assert not any(rows[-empty:].any() for rows in found[-1].values())
    for one, other in zip(found, eval_batches(tokens, 4, 24, 32), strict=True):
        assert_same(one, other)


def test_numbers_for_the_banner():
    made = batches(source_length=8, target_length=9)
    lengths_N2 = made.tokens.lengths_N2
    fits = (lengths_N2[:, 0] <= 7) & (lengths_N2[:, 1] <= 8)
    assert (made.pairs, made.excluded) == (fits.sum(), (~fits).sum())
    counts = [
        [(made.batch_at(step)[name] > 0).sum() for name in ("source_BS", "targets_BT")]
        for step in range(made.packing.rows)  # each row four times
    ]
    source, target = np.mean(counts, axis=0)
    assert made.tokens_per_batch == pytest.approx(target)
    assert made.padding == pytest.approx((1 - source / (4 * 8), 1 - target / (4 * 9)))


def test_the_fingerprint_tells_apart_what_gives_other_batches():
    made = [
        batches(),
        batches(pairs=59),
        batches(seed=4),
        batches(rows=5),
        batches(source_length=23),
        batches(target_length=31),
        batches(max_tokens=9),
    ]
    assert len({one.fingerprint for one in made}) == len(made)
    assert made[0].fingerprint == batches().fingerprint


@pytest.mark.parametrize(
    ("pairs", "options", "parts"),
    [
        ([], {}, ["no sentence pairs", "config.data"]),
        ([(9, 4), (3, 40)], {}, ["9 source and 4 target", "(the longest: 9 and 40)", "_length"]),
        ([(5, 5), (7, 7)], {"max_tokens": 4}, ["5 source", "config.data.max_tokens=4"]),
    ],
)
def test_nothing_that_fits_is_an_error_with_a_cure(pairs, options, parts):
    tokens = TokenPairs.of([[9] * s for s, _ in pairs], [[9] * t for _, t in pairs])
    with pytest.raises(UserError) as error:
        Batches(tokens, seed=0, rows=2, source_length=8, target_length=8, **options)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetch_gives_the_batches_of_its_steps_in_order(workers):
    made = batches()
    steps = []
    for step, batch in prefetch(made, 7, 27, rows=slice(1, 3), workers=workers):
        assert_same(batch, made.batch_at(step, slice(1, 3)))
        steps.append(step)
    assert steps == list(range(7, 27))
    assert not list(prefetch(made, 7, 7))


@pytest.mark.parametrize("workers", [0, 1])
def test_leaving_prefetch_early_ends_its_threads_and_processes(workers):
    before = threading.active_count()
    with contextlib.closing(prefetch(batches(), 0, 10**9, workers=workers)) as iterator:
        assert next(iterator)[0] == 0
        assert threading.active_count() > before
    assert threading.active_count() == before
    assert not multiprocessing.active_children()


class Broken(Batches):
    def batch_at(self, step, rows=slice(None)):
        if step == 3:
            raise UserError("pair 3 is broken")
        return super().batch_at(step, rows)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_background_come_to_the_front(workers):
    made = Broken(numbered(60), seed=0, rows=4, source_length=24, target_length=32)
    iterator = prefetch(made, 0, 9, workers=workers)
    assert [next(iterator)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="pair 3 is broken"):
        next(iterator)
    assert not multiprocessing.active_children()
