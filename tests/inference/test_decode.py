"""Decoding against brute force, and the cache against the whole decoder."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.config import ModelConfig
from jaxformer.data.tokenizer import BOS, EOS, PAD, UNK
from jaxformer.inference.decode import (
    Sampling,
    beam_search,
    best,
    length_penalty,
    log_probabilities,
    sample,
    truncate,
)
from jaxformer.model import Transformer, decode, encode, logits
from jaxformer.model.cache import init_cache, reorder, step

TINY = ModelConfig(
    d_model=16, num_heads=4, d_ff=32, encoder_layers=1, decoder_layers=2, dropout=0.0
)
MODERN = dataclasses.replace(
    TINY,
    norm="rms",
    norm_position="pre",
    positions="rotary",
    activation="swiglu",
    num_kv_heads=2,
    bias=False,
)
LEARNED = dataclasses.replace(TINY, positions="learned", max_length=16, tie_output=False)
V, T = 7, 4

encode, decode, logits, step = (jax.jit(f) for f in (encode, decode, logits, step))
SOURCE = np.array([[5, 4, 6, EOS, 0], [6, EOS, 0, 0, 0]], np.int32)
SEGMENTS = (SOURCE != PAD).astype(np.int32)


def build(config: ModelConfig, vocab_size: int = V, scale: float = 3.0) -> Transformer:
    """A random model; scaled up, so that its choices differ."""
    model = jax.jit(lambda: Transformer(config, vocab_size, jax.random.key(7)))()
    return jax.tree.map(lambda leaf: leaf * scale, model)


def positions(tokens: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)


def teacher_forced(model: Transformer, targets_BT: np.ndarray, source=SOURCE) -> np.ndarray:
    """log p of every next token, by the whole decoder at once."""
    segments = (source != PAD).astype(np.int32)
    memory = encode(model, source, segments, positions(source))
    inputs = np.concatenate([np.full_like(targets_BT[:, :1], BOS), targets_BT[:, :-1]], axis=1)
    x = decode(model, inputs, np.ones_like(inputs), positions(inputs), memory, segments)
    B, length = targets_BT.shape
    flat = logits(model, x).reshape(B * length, -1)
    return np.asarray(log_probabilities(flat), np.float64).reshape(B, length, -1)


@pytest.mark.parametrize("config", [TINY, MODERN, LEARNED], ids=["paper", "modern", "learned"])
def test_cached_steps_score_as_the_whole_decoder_does(config):
    model = build(config, 11, scale=1.0)
    rng = np.random.default_rng(0)
    targets = rng.integers(4, 11, (2, 6)).astype(np.int32)
    wanted = teacher_forced(model, targets)
    memory = encode(model, SOURCE, SEGMENTS, positions(SOURCE))
    # Two hypotheses a source; the second copy must do as the first.
    cache = init_cache(model, memory, jnp.asarray(SEGMENTS), 2, 6)
    tokens_R = np.full(4, BOS, np.int32)
    for place in range(6):
        scores_RV, cache = step(model, jnp.asarray(tokens_R), jnp.int32(place), cache)
        got = np.asarray(log_probabilities(scores_RV)).reshape(2, 2, -1)
        np.testing.assert_allclose(got[:, 0], wanted[:, place], atol=1e-5)
        np.testing.assert_allclose(got[:, 1], wanted[:, place], atol=1e-5)
        tokens_R = np.repeat(targets[:, place], 2)


def test_reorder_moves_the_tokens_and_not_the_source():
    model = build(TINY)
    memory = encode(model, SOURCE, SEGMENTS, positions(SOURCE))
    cache = init_cache(model, memory, jnp.asarray(SEGMENTS), 1, 3)
    _, cache = step(model, jnp.array([4, 5]), jnp.int32(0), cache)
    swapped = reorder(cache, jnp.array([1, 0]))
    for before, after in zip(cache.own, swapped.own, strict=True):
        np.testing.assert_array_equal(before[0][0], after[0][1])
    assert swapped.source is cache.source


def enumerate_all(model: Transformer, row: int, alpha: float) -> list[tuple[float, tuple]]:
    """Every sequence that ends within T tokens, with its penalised score, best first."""
    words = [token for token in range(V) if token not in (PAD, UNK, BOS, EOS)]
    found = []
    for n in range(T):
        bodies = list(itertools.product(words, repeat=n))
        targets = np.array([[*body, EOS] for body in bodies], np.int32)
        log_p = teacher_forced(model, targets, np.repeat(SOURCE[row : row + 1], len(bodies), 0))
        picked = np.take_along_axis(log_p, targets[:, :, None], axis=2)[..., 0].sum(1)
        penalty = ((5 + n + 1) / 6) ** alpha
        found += [(p / penalty, tuple(t)) for p, t in zip(picked, targets.tolist(), strict=True)]
    return sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("config", "alpha"), [(TINY, 0.0), (TINY, 2.0), (MODERN, 0.6)], ids=["0", "2", "modern"]
)
def test_a_wide_beam_finds_what_brute_force_finds(config, alpha):
    model = build(config)
    N = 40  # more than the 27 prefixes of length 3: nothing can be pruned
    search = functools.partial(
        beam_search, model, SOURCE, SEGMENTS, beam=N, alpha=alpha, max_length=T
    )
    tokens_BNT, scores_BN, _ = search(n_best=10)
    best = search()  # may stop earlier
    np.testing.assert_array_equal(best.tokens_BNT, tokens_BNT[:, :1])
    np.testing.assert_array_equal(best.scores_BN, scores_BN[:, :1])
    for row in range(2):
        wanted = enumerate_all(model, row, alpha)[:10]
        np.testing.assert_allclose(scores_BN[row, :10], [s for s, _ in wanted], atol=1e-4)
        for rank, (_, tokens) in enumerate(wanted):
            assert tuple(t for t in tokens_BNT[row, rank].tolist() if t != PAD) == tokens


def test_beam_of_one_is_greedy():
    model = build(MODERN, 30)
    keys = jax.random.split(jax.random.key(0), 2)
    greedy = sample(model, SOURCE, SEGMENTS, keys, max_length=12, sampling=None)
    beam = beam_search(model, SOURCE, SEGMENTS, beam=1, alpha=0.0, max_length=12)
    np.testing.assert_array_equal(greedy.tokens_BNT, beam.tokens_BNT)
    np.testing.assert_allclose(greedy.scores_BN, beam.scores_BN, rtol=1e-5)


def test_hypotheses_that_never_end_are_returned_with_their_own_scores():
    model = deaf_to_eos(build(TINY, 30, scale=1.0))
    tokens, scores, _ = beam_search(
        model, SOURCE, SEGMENTS, beam=2, alpha=0.6, max_length=3, n_best=2
    )
    assert (np.asarray(tokens) != PAD).all()
    log_p = teacher_forced(model, np.asarray(tokens[:, 0]))
    picked = np.take_along_axis(log_p, np.asarray(tokens[:, 0])[:, :, None], axis=2).sum((1, 2))
    np.testing.assert_allclose(scores[:, 0], picked / (8 / 6) ** 0.6, rtol=1e-4)


def deaf_to_eos(model: Transformer) -> Transformer:
    """The model with all outputs pointing away from the embedding of EOS."""
    last = model.decoder.blocks.feed_forward_norm.bias_D
    last[...] = last[...].at[-1].set(1.0)
    model.embedding_VD[...] = model.embedding_VD[...].at[EOS].set(-100.0)
    return model


def test_the_answer_to_a_row_does_not_depend_on_its_neighbours():
    model = build(MODERN, 30)
    both = beam_search(model, SOURCE, SEGMENTS, beam=3, alpha=0.6, max_length=10)
    alone = beam_search(model, SOURCE[1:], SEGMENTS[1:], beam=3, alpha=0.6, max_length=10)
    np.testing.assert_array_equal(both.tokens_BNT[1], alone.tokens_BNT[0])
    with_empty = np.concatenate([SOURCE[1:], np.zeros_like(SOURCE[:1])])
    padded = beam_search(
        model, with_empty, (with_empty != 0).astype(np.int32), beam=3, alpha=0.6, max_length=10
    )
    np.testing.assert_array_equal(padded.tokens_BNT[0], alone.tokens_BNT[0])


def test_length_penalty_is_the_formula():
    assert float(length_penalty(1, 0.6)) == pytest.approx(1.0)
    assert float(length_penalty(10, 0.6)) == pytest.approx(2.5**0.6)
    assert float(length_penalty(10, 0.0)) == 1.0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(2, 9), st.data())
def test_best_is_a_sort_of_everything(beams, width, data):
    count = data.draw(st.integers(1, min(beams * width, 4)))
    numbers = st.floats(-9, 0, allow_nan=False, width=32)
    size = 2 * beams * width
    values = data.draw(st.lists(numbers, min_size=size, max_size=size, unique=True))
    totals = np.array(values, np.float32).reshape(2, beams, width)
    top, parents, tokens = best(jnp.asarray(totals), count)
    wanted = -np.sort(-totals.reshape(2, -1), axis=1)[:, :count]
    np.testing.assert_array_equal(top, wanted)
    np.testing.assert_array_equal(totals[np.arange(2)[:, None], parents, tokens], wanted)


def test_forbidden_tokens_have_no_probability():
    log_p = np.asarray(log_probabilities(jnp.zeros((1, V))))[0]
    assert (log_p[[PAD, UNK, BOS]] < -1e8).all()
    np.testing.assert_allclose(np.exp(log_p[[EOS, 4, 5, 6]]), 0.25, rtol=1e-6)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), [0, 1, 2, 3]),
        (Sampling(top_k=2), [0, 1]),
        (Sampling(top_p=0.45), [0]),
        (Sampling(top_p=0.55), [0, 1]),
        (Sampling(top_p=0.85), [0, 1, 2]),
        (Sampling(top_k=1, top_p=0.9), [0]),
        (Sampling(top_k=3, top_p=0.8), [0, 1]),
    ],
)
def test_truncation_keeps_the_top_and_the_nucleus(sampling, kept):
    logits_14 = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    cut = np.asarray(truncate(logits_14, sampling))[0]
    assert np.flatnonzero(cut > -1e8).tolist() == kept


def test_samples_follow_the_model_and_their_seed():
    model = build(TINY, scale=2.0)
    rows = 4000
    source = np.repeat(SOURCE[:1], rows, 0)
    segments = (source != 0).astype(np.int32)
    keys = jax.random.split(jax.random.key(3), rows)
    hot = Sampling(temperature=1.5)
    drawn = sample(model, source, segments, keys, max_length=1, sampling=hot)
    again = sample(model, source, segments, keys, max_length=1, sampling=hot)
    np.testing.assert_array_equal(drawn.tokens_BNT, again.tokens_BNT)
    log_p = teacher_forced(model, np.full((1, 1), EOS, np.int32), SOURCE[:1])[0, 0] / 1.5
    wanted = np.exp(log_p - np.logaddexp.reduce(log_p))
    got = np.bincount(np.asarray(drawn.tokens_BNT).reshape(-1), minlength=V) / rows
    # Four standard deviations of a share.
    np.testing.assert_array_less(abs(got - wanted), 4 * np.sqrt(0.25 / rows))
    greedy = sample(model, source, segments, keys, max_length=3, sampling=None)
    first = sample(model, source, segments, keys, max_length=3, sampling=Sampling(top_k=1))
    np.testing.assert_array_equal(greedy.tokens_BNT, first.tokens_BNT)
    boiling = sample(
        model, source, segments, keys, max_length=1, sampling=Sampling(temperature=1e12)
    )
    shares = np.bincount(np.asarray(boiling.tokens_BNT).reshape(-1), minlength=V) / rows
    assert shares[[PAD, UNK, BOS]].sum() == 0
    assert shares[EOS:].min() > 0
