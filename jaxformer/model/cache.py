"""Decoding token by token: what was computed for earlier tokens is kept, not computed again."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxformer.attention import Mask, attention
from jaxformer.model.layers import Block
from jaxformer.model.positions import rotate
from jaxformer.model.transformer import (
    Stack,
    Transformer,
    embed,
    logits,
    rotation,
    target_table,
)

KeysValues = tuple[Array, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of each decoder layer, for R = B N rows: N hypotheses for each source.

    Attributes:
      layers: the decoder's blocks, one by one. They are cut out of their stack here, once, since
        cutting inside the decoding loop would copy all weights at every token.
      own: for each layer the keys and values of the tokens so far, [R, T, G, K].
      source: for each layer the keys and values of the source, [B, S, G, K]; hypotheses share them.
      segments_BS: 1 where there is source, 0 for padding.
    """

    layers: tuple[Block, ...]
    own: tuple[KeysValues, ...]
    source: tuple[KeysValues, ...]
    segments_BS: Array


def unstack(stack: Stack) -> tuple[Block, ...]:
    """The layers of a stack, bottom first."""
    depth = jax.tree.leaves(stack.blocks)[0].shape[0]
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stack.blocks) for i in range(depth))


def init_cache(
    model: Transformer, memory_BSD: Array, segments_BS: Array, hypotheses: int, max_length: int
) -> Cache:
    """An empty cache for `max_length` tokens of `hypotheses` per source; reads the memory once."""
    layers = unstack(model.decoder)
    source = tuple(
        layer.cross_attention.keys_values(memory_BSD)
        for layer in layers
        if layer.cross_attention is not None
    )
    B, _, G, K = source[0][0].shape
    empty = jnp.zeros((B * hypotheses, max_length, G, K), memory_BSD.dtype)
    return Cache(layers, tuple((empty, empty) for _ in layers), source, segments_BS)


def step(model: Transformer, tokens_R: Array, position: Array, cache: Cache) -> tuple[Array, Cache]:
    """Reads one token per row and scores the next one.

    Args:
      model: the parameters.
      tokens_R: int32 [R], the token at `position`.
      position: int32 scalar, the same for all rows; counts from 0.
      cache: of the tokens before.

    Returns:
      Logits float32 [R, V], and the cache with this token in it.
    """
    positions_R1 = jnp.full((tokens_R.shape[0], 1), position, jnp.int32)
    x_R1D = embed(
        model.config,
        target_table(model),
        model.target_positions_TD,
        tokens_R[:, None],
        positions_R1,
    )
    turn = rotation(model.config, positions_R1)
    own = []
    for layer, kept, source in zip(cache.layers, cache.own, cache.source, strict=True):
        x_R1D, kept = _layer(layer, x_R1D, kept, source, cache.segments_BS, position, turn)
        own.append(kept)
    if model.decoder.norm is not None:
        x_R1D = model.decoder.norm(x_R1D)
    return logits(model, x_R1D)[:, 0], dataclasses.replace(cache, own=tuple(own))


def reorder(cache: Cache, parents_R: Array) -> Cache:
    """The cache with row r holding the tokens of row parents_R[r], as beam search goes on."""
    own = jax.tree.map(lambda rows: rows[parents_R], cache.own)
    return dataclasses.replace(cache, own=own)


def _layer(
    block: Block,
    x_R1D: Array,
    kept: KeysValues,
    source: KeysValues,
    segments_BS: Array,
    position: Array,
    turn: tuple[Array, Array] | None,
) -> tuple[Array, KeysValues]:
    """`Block.__call__` for a single position."""
    updated = []

    def attend_to_self(y_R1D: Array) -> Array:
        own = block.self_attention
        q_R1HK, (k_R1GK, v_R1GK) = own.queries(y_R1D), own.keys_values(y_R1D)
        if turn is not None:
            q_R1HK, k_R1GK = rotate(q_R1HK, turn), rotate(k_R1GK, turn)
        k_RTGK, v_RTGK = (
            jax.lax.dynamic_update_slice_in_dim(rows, new, position, axis=1)
            for rows, new in zip(kept, (k_R1GK, v_R1GK), strict=True)
        )
        updated.append((k_RTGK, v_RTGK))
        R, T = k_RTGK.shape[:2]
        known_RT = jnp.broadcast_to((jnp.arange(T) <= position).astype(jnp.int32)[None], (R, T))
        mask = Mask(jnp.ones((R, 1), jnp.int32), known_RT)
        return own.output(attention(q_R1HK, k_RTGK, v_RTGK, mask))

    def attend_to_source(y_R1D: Array) -> Array:
        cross = block.cross_attention
        assert cross is not None
        q_R1HK = cross.queries(y_R1D)
        B, (R, _, H, K) = segments_BS.shape[0], q_R1HK.shape
        # The hypotheses of a source are its queries: one product of matrices for all of them.
        mask = Mask(jnp.ones((B, R // B), jnp.int32), segments_BS)
        heads_BNHK = attention(q_R1HK.reshape(B, R // B, H, K), *source, mask)
        return cross.output(heads_BNHK.reshape(R, 1, H, K))

    x_R1D = block.residual(x_R1D, block.self_attention_norm, attend_to_self, None)
    assert block.cross_attention_norm is not None
    x_R1D = block.residual(x_R1D, block.cross_attention_norm, attend_to_source, None)
    x_R1D = block.residual(x_R1D, block.feed_forward_norm, block.feed_forward, None)
    return x_R1D, updated[0]
