"""Choosing tokens: greedy, by beam search, or by chance. Each is one compiled program per shape."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxformer.data.tokenizer import BOS, EOS, PAD, UNK
from jaxformer.model import Transformer, encode
from jaxformer.model.cache import Cache, init_cache, reorder, step

NEVER = (PAD, UNK, BOS)
"""Tokens that no translation holds: the bytes spell what has no piece."""

LOWEST = -1e9
"""A log-probability that no hypothesis reaches, and that arithmetic survives."""


class Steps(NamedTuple):
    """What beam search looked at: C candidates at each of T steps, best first.

    A candidate continues row `parents_TBC` of the hypotheses that grew at this step, which are the
    candidates of the step before at `places_TBN`. Steps after the last are zeros.
    """

    totals_TBC: Array  # log-probabilities in nats
    parents_TBC: Array
    tokens_TBC: Array
    places_TBN: Array  # the candidates that grow on; of the others, those without EOS are dropped
    taken: Array  # steps done


class Decoded(NamedTuple):
    """Hypotheses, best first: tokens int32 [B, N, T], EOS kept and PAD after it, and scores [B, N].

    A score is the log-probability in nats, over the length penalty in beam search. `steps` is there
    where a search was asked to record them.
    """

    tokens_BNT: Array
    scores_BN: Array
    steps: Steps | None = None


class Sampling(NamedTuple):
    """How chance may choose: temperature above 0, top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def log_probabilities(logits_RV: Array) -> Array:
    """log softmax over the tokens that a translation may hold; LOWEST for the others."""
    tokens_1V = jnp.arange(logits_RV.shape[-1])[None]
    for token in NEVER:
        logits_RV = jnp.where(tokens_1V == token, LOWEST, logits_RV)
    return jax.nn.log_softmax(logits_RV, axis=-1)


def length_penalty(length: Array | float, alpha: float) -> Array:
    """((5 + n) / 6)^alpha (Wu et al. 2016, equation 14; the paper uses alpha = 0.6)."""
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


def truncate(logits_RV: Array, sampling: Sampling) -> Array:
    """Logits with everything outside top-k and the nucleus of mass top_p at LOWEST.

    The nucleus is the smallest set of most likely tokens that holds the mass (Holtzman et al.
    2019); the token that crosses the border belongs to it.
    """
    sorted_RV = jnp.sort(logits_RV, axis=-1, descending=True)
    V = logits_RV.shape[-1]
    border_R1 = sorted_RV[:, min(sampling.top_k or V, V) - 1][:, None]
    if sampling.top_p < 1.0:
        kept_RV = jnp.where(sorted_RV >= border_R1, sorted_RV, LOWEST)
        before_RV = jnp.cumsum(jax.nn.softmax(kept_RV, axis=-1), axis=-1)
        inside_RV = before_RV - jax.nn.softmax(kept_RV, axis=-1) < sampling.top_p
        nucleus_R1 = jnp.where(inside_RV, sorted_RV, jnp.inf).min(-1, keepdims=True)
        border_R1 = jnp.maximum(border_R1, nucleus_R1)
    return jnp.where(logits_RV >= border_R1, logits_RV, LOWEST)


@functools.partial(jax.jit, static_argnames=("max_length", "sampling"))
def sample(
    model: Transformer,
    source_BS: Array,
    segments_BS: Array,
    keys_B: Array,
    *,
    max_length: int,
    sampling: Sampling | None,
) -> Decoded:
    """One hypothesis per source: the likeliest token each time, or one drawn by `sampling`.

    Args:
      model: the parameters.
      source_BS: int32; each row one sentence and its EOS.
      segments_BS: 1 for tokens, 0 for padding; an empty row is finished at once.
      keys_B: a random key for each row, so that a draw does not depend on its neighbours.
      max_length: T.
      sampling: None is greedy.
    """
    B = source_BS.shape[0]
    cache, empty_B = _begin(model, source_BS, segments_BS, 1, max_length)

    def choose(logits_BV: Array, position: Array) -> Array:
        if sampling is None:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        # A high temperature must not bring the forbidden tokens near the others.
        heated_BV = jnp.where(logits_BV > LOWEST / 2, logits_BV / sampling.temperature, -jnp.inf)
        cut_BV = truncate(heated_BV, sampling)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, position)
        return jax.vmap(jax.random.categorical)(keys, cut_BV).astype(jnp.int32)

    def unfinished(loop) -> Array:
        position, _, _, done_B, _, _ = loop
        return (position < max_length) & ~done_B.all()

    def body(loop):
        position, last_B, tokens_BT, done_B, score_B, cache = loop
        logits_BV, cache = step(model, last_B, position, cache)
        scores_BV = log_probabilities(logits_BV)
        next_B = jnp.where(done_B, PAD, choose(scores_BV, position))
        gain_B = jnp.take_along_axis(scores_BV, next_B[:, None], axis=1)[:, 0]
        score_B += jnp.where(done_B, 0.0, gain_B)
        tokens_BT = jax.lax.dynamic_update_slice_in_dim(
            tokens_BT, next_B[:, None], position, axis=1
        )
        return position + 1, next_B, tokens_BT, done_B | (next_B == EOS), score_B, cache

    tokens_BT = jnp.full((B, max_length), PAD, jnp.int32)
    first = (jnp.int32(0), jnp.full((B,), BOS, jnp.int32), tokens_BT, empty_B, jnp.zeros(B), cache)
    _, _, tokens_BT, _, score_B, _ = jax.lax.while_loop(unfinished, body, first)
    return Decoded(tokens_BT[:, None], score_B[:, None])


class _Beam(NamedTuple):
    position: Array
    alive_BNT: Array  # growing hypotheses
    alive_BN: Array  # their log-probabilities, descending
    ended_BNT: Array  # hypotheses that reached EOS
    ended_BN: Array  # their scores (penalised), descending
    cache: Cache
    steps: Steps | None


@functools.partial(jax.jit, static_argnames=("beam", "alpha", "max_length", "n_best", "record"))
def beam_search(
    model: Transformer,
    source_BS: Array,
    segments_BS: Array,
    *,
    beam: int,
    alpha: float,
    max_length: int,
    n_best: int = 1,
    record: bool = False,
) -> Decoded:
    """The `n_best` hypotheses by log-probability over length penalty, of `beam` kept at each step.

    A source is finished when no growing hypothesis can still get among them. Where fewer than
    `n_best` hypotheses end within `max_length` tokens, cut-off ones fill the places after them.
    With `record` the result has its `steps`.
    """
    B, N, T = source_BS.shape[0], beam, max_length
    cache, empty_B = _begin(model, source_BS, segments_BS, N, T)

    def open_B(state: _Beam) -> Array:
        # Log-probabilities only fall, so the longest length gives the highest score to hope for.
        hope_B = state.alive_BN[:, 0] / length_penalty(T, alpha)
        return ~empty_B & (hope_B > state.ended_BN[:, n_best - 1])

    def unfinished(state: _Beam) -> Array:
        return (state.position < T) & open_B(state).any()

    def body(state: _Beam) -> _Beam:
        position = state.position
        before_BN = jax.lax.dynamic_index_in_dim(
            state.alive_BNT, jnp.maximum(position - 1, 0), axis=2, keepdims=False
        )
        last_BN = jnp.where(position == 0, BOS, before_BN)
        logits_RV, cache = step(model, last_BN.reshape(B * N), position, state.cache)
        V = logits_RV.shape[-1]
        totals_BNV = state.alive_BN[:, :, None] + log_probabilities(logits_RV).reshape(B, N, V)
        # Of 2N candidates at most N end here, so N are left to grow.
        top_BC, parents_BC, tokens_BC = best(totals_BNV, 2 * N)
        grown_BCT = jnp.take_along_axis(state.alive_BNT, parents_BC[:, :, None], axis=1)
        grown_BCT = jax.lax.dynamic_update_slice_in_dim(
            grown_BCT, tokens_BC[:, :, None], position, axis=2
        )
        ends_BC = tokens_BC == EOS
        scores_BC = jnp.where(ends_BC, top_BC / length_penalty(position + 1, alpha), LOWEST)
        ended_BN, ended_BNT = _best_of(
            jnp.concatenate([state.ended_BN, scores_BC], axis=1),
            jnp.concatenate([state.ended_BNT, grown_BCT], axis=1),
            N,
        )
        alive_BN, places_BN = jax.lax.top_k(jnp.where(ends_BC, LOWEST, top_BC), N)
        alive_BNT = jnp.take_along_axis(grown_BCT, places_BN[:, :, None], axis=1)
        parents_BN = jnp.take_along_axis(parents_BC, places_BN, axis=1)
        rows_BN = jnp.arange(B)[:, None] * N + parents_BN
        cache = reorder(cache, rows_BN.reshape(B * N))
        steps = state.steps
        if steps is not None:
            new = (top_BC, parents_BC, tokens_BC, places_BN)
            rows = [kept.at[position].set(row) for kept, row in zip(steps[:-1], new, strict=True)]
            steps = Steps(rows[0], rows[1], rows[2], rows[3], position + 1)
        return _Beam(position + 1, alive_BNT, alive_BN, ended_BNT, ended_BN, cache, steps)

    nothing_BNT = jnp.full((B, N, T), PAD, jnp.int32)
    # All hypotheses begin alike: but for one they are barred from the first choice.
    alive_BN = jnp.broadcast_to(jnp.where(jnp.arange(N) == 0, 0.0, LOWEST)[None], (B, N))
    ended_BN = jnp.full((B, N), LOWEST)
    steps = _no_steps(T, B, N) if record else None
    start = _Beam(jnp.int32(0), nothing_BNT, alive_BN, nothing_BNT, ended_BN, cache, steps)
    end = jax.lax.while_loop(unfinished, body, start)
    # Both lists are sorted: first what has ended, then what was cut off, in their own order.
    ended_B1 = (end.ended_BN > LOWEST / 2).sum(axis=1, keepdims=True)
    places_BN = jnp.broadcast_to(jnp.arange(N)[None], (B, N))
    places_BN = jnp.where(places_BN < ended_B1, places_BN, N + places_BN - ended_B1)
    cut_off_BN = end.alive_BN / length_penalty(T, alpha)
    scores_BM = jnp.concatenate([end.ended_BN, cut_off_BN], axis=1)
    tokens_BMT = jnp.concatenate([end.ended_BNT, end.alive_BNT], axis=1)
    scores_BN = jnp.take_along_axis(scores_BM, places_BN, axis=1)
    tokens_BNT = jnp.take_along_axis(tokens_BMT, places_BN[:, :, None], axis=1)
    return Decoded(tokens_BNT[:, :n_best], scores_BN[:, :n_best], end.steps)


def _no_steps(T: int, B: int, N: int) -> Steps:
    whole = jnp.zeros((T, B, 2 * N), jnp.int32)
    places = jnp.zeros((T, B, N), jnp.int32)
    return Steps(whole.astype(jnp.float32), whole, whole, places, jnp.int32(0))


def best(totals_BNV: Array, count: int) -> tuple[Array, Array, Array]:
    """The best continuations of each source: values, parents and tokens, [B, count], descending.

    The best of each hypothesis are found first; only those compete with each other.
    """
    B, N, V = totals_BNV.shape
    each = min(count, V)
    values_BNC, tokens_BNC = jax.lax.top_k(totals_BNV, each)
    values_BC, places_BC = jax.lax.top_k(values_BNC.reshape(B, N * each), count)
    tokens_BC = jnp.take_along_axis(tokens_BNC.reshape(B, N * each), places_BC, axis=1)
    return values_BC, places_BC // each, tokens_BC


def _best_of(scores_BM: Array, rows_BMT: Array, count: int) -> tuple[Array, Array]:
    scores_BN, places_BN = jax.lax.top_k(scores_BM, count)
    return scores_BN, jnp.take_along_axis(rows_BMT, places_BN[:, :, None], axis=1)


def _begin(
    model: Transformer, source_BS: Array, segments_BS: Array, hypotheses: int, max_length: int
) -> tuple[Cache, Array]:
    """Encodes the source; the cache to decode with, and which rows are empty."""
    B, S = source_BS.shape
    positions_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None], (B, S))
    memory_BSD = encode(model, source_BS, segments_BS, positions_BS)
    cache = init_cache(model, memory_BSD, segments_BS, hypotheses, max_length)
    return cache, segments_BS.max(axis=1) == 0
