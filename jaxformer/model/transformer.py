"""The Transformer of "Attention is all you need" (Vaswani et al. 2017) and its later forms."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxformer.attention import Mask
from jaxformer.attention.dropout import dropout
from jaxformer.attention.platform import platform
from jaxformer.config import ModelConfig, head_dim
from jaxformer.model import positions
from jaxformer.model.layers import Block, Norm, Record, fold, weight
from jaxformer.sharding import spec


class Stack(nnx.Module):
    """Layers on top of each other, their parameters stacked along a leading axis L.

    Encoder, decoder, encoder-only and decoder-only models are all made of this: what differs is
    the mask of the call and whether there is a memory to attend to.
    """

    def __init__(self, config: ModelConfig, layers: int, cross_attention: bool, key: Array):
        self.remat = config.remat
        self.blocks = jax.vmap(lambda k: Block(config, cross_attention, k))(
            jax.random.split(key, layers)
        )
        # Post-norm blocks end in a norm of their own.
        self.norm = Norm(config) if config.norm_position == "pre" else None

    def __call__(
        self,
        x_BTD: Array,
        mask: Mask,
        rotation: tuple[Array, Array] | None = None,
        memory: tuple[Array, Mask] | None = None,
        key: Array | None = None,
        record: Record | None = None,
    ) -> Array:
        """[B, T, D] through all layers: [B, T, D].

        A `record` receives the records of the blocks, their arrays stacked along a leading axis L.
        """

        def layer(
            x_BTD: Array, block_and_index: tuple[Block, Array]
        ) -> tuple[Array, Record | None]:
            block, index = block_and_index
            seen: Record | None = None if record is None else {}
            return block(x_BTD, mask, rotation, memory, fold(key, index), seen), seen

        layers = jax.tree.leaves(self.blocks)[0].shape[0]
        step = jax.checkpoint(layer) if self.remat else layer
        # On the CPU a loop over layers copies what the backward pass needs (10 % of a step);
        # elsewhere it keeps the program, and the time to compile it, independent of depth.
        unroll = platform() == "cpu"
        x_BTD, seen = jax.lax.scan(step, x_BTD, (self.blocks, jnp.arange(layers)), unroll=unroll)
        if record is not None:
            record |= seen
        return x_BTD if self.norm is None else self.norm(x_BTD)


class Transformer(nnx.Module):
    """The parameters of an encoder-decoder."""

    def __init__(self, config: ModelConfig, vocab_size: int, key: Array):
        self.config = config
        keys = jax.random.split(key, 7)

        def table(key: Array, rows: int, *axes: str | None) -> nnx.Param:
            draw = jax.random.normal(key, (rows, config.d_model), out_sharding=spec(*axes))
            return nnx.Param(draw * config.d_model**-0.5)

        self.embedding_VD = table(keys[0], vocab_size, "vocab", "embed")
        self.target_embedding_VD = (
            None if config.share_embeddings else table(keys[1], vocab_size, "vocab", "embed")
        )
        self.output_VD = None if config.tie_output else table(keys[2], vocab_size, "vocab", "embed")
        learned = config.positions == "learned"
        self.source_positions_TD = (
            table(keys[3], config.max_length, None, None) if learned else None
        )
        self.target_positions_TD = (
            table(keys[4], config.max_length, None, None) if learned else None
        )
        self.encoder = Stack(config, config.encoder_layers, False, keys[5])
        self.decoder = Stack(config, config.decoder_layers, True, keys[6])


def embed(
    config: ModelConfig,
    table_VD: nnx.Param,
    position_table_TD: nnx.Param | None,
    tokens_BT: Array,
    positions_BT: Array,
    key: Array | None = None,
    record: Record | None = None,
) -> Array:
    """Token embeddings times sqrt(D), plus positions, with dropout on the sum: [B, T, D].

    Sections 3.4, 3.5 and 5.4. Rotary positions are added nowhere; they turn queries and keys.

    A `record` receives embedding_BTD, without positions, and input_BTD, with them.
    """
    dtype = jnp.dtype(config.dtype)
    rows = spec("batch", "length", None)
    x_BTD = weight(table_VD, dtype).at[tokens_BT].get(out_sharding=rows)
    x_BTD *= jnp.asarray(config.d_model**0.5, dtype)
    embedding_BTD = x_BTD
    if config.positions == "sinusoidal":
        x_BTD += positions.sinusoidal(positions_BT, config.d_model).astype(dtype)
    elif position_table_TD is not None:
        x_BTD += weight(position_table_TD, dtype).at[positions_BT].get(out_sharding=rows)
    if record is not None:
        record |= {"embedding_BTD": embedding_BTD, "input_BTD": x_BTD}
    return dropout(x_BTD, config.dropout, key)


def rotation(config: ModelConfig, positions_BT: Array) -> tuple[Array, Array] | None:
    """The turn of queries and keys at each position, if positions are rotary."""
    if config.positions != "rotary":
        return None
    return positions.rotary(positions_BT, head_dim(config))


def encode(
    model: Transformer,
    source_BS: Array,
    segments_BS: Array,
    positions_BS: Array,
    *,
    key: Array | None = None,
    record: Record | None = None,
) -> Array:
    """Reads the source: memory_BSD. `key` turns dropout on; `record` is filled by all parts."""
    x_BSD = embed(
        model.config,
        model.embedding_VD,
        model.source_positions_TD,
        source_BS,
        positions_BS,
        fold(key, 0),
        record,
    )
    mask = Mask(segments_BS, segments_BS)
    turn = rotation(model.config, positions_BS)
    return model.encoder(x_BSD, mask, turn, key=fold(key, 1), record=record)


def target_table(model: Transformer) -> nnx.Param:
    """The embedding of target tokens, which may be the source's."""
    own = model.target_embedding_VD
    return model.embedding_VD if own is None else own


def output_table(model: Transformer) -> nnx.Param:
    """The rows that score each token of the vocabulary; the target embedding when tied."""
    return target_table(model) if model.output_VD is None else model.output_VD


def decode(
    model: Transformer,
    inputs_BT: Array,
    segments_BT: Array,
    positions_BT: Array,
    memory_BSD: Array,
    source_segments_BS: Array,
    *,
    key: Array | None = None,
    record: Record | None = None,
    causal: bool = True,
) -> Array:
    """Runs the decoder over known target tokens (teacher forcing): x_BTD, before the output layer.

    Position t sees the tokens up to t of its own segment (all of them if not `causal`, to show what
    that breaks), and the source of the same segment.
    """
    x_BTD = embed(
        model.config,
        target_table(model),
        model.target_positions_TD,
        inputs_BT,
        positions_BT,
        fold(key, 0),
        record,
    )
    return model.decoder(
        x_BTD,
        Mask(segments_BT, segments_BT, causal=causal),
        rotation(model.config, positions_BT),
        memory=(memory_BSD, Mask(segments_BT, source_segments_BS)),
        key=fold(key, 1),
        record=record,
    )


def forward(
    model: Transformer,
    batch: dict[str, Array],
    key: Array | None = None,
    *,
    record: Record | None = None,
    causal: bool = True,
) -> Array:
    """Source and target inputs of a packed batch to the decoder's output: x_BTD.

    A `record` receives those of encoder and decoder; `causal` is explained at `decode`.
    """
    parts: tuple[Record | None, Record | None] = (None, None)
    if record is not None:
        parts = record.setdefault("encoder", {}), record.setdefault("decoder", {})
    memory_BSD = encode(
        model,
        batch["source_BS"],
        batch["source_segments_BS"],
        batch["source_positions_BS"],
        key=fold(key, 0),
        record=parts[0],
    )
    return decode(
        model,
        batch["inputs_BT"],
        batch["target_segments_BT"],
        batch["target_positions_BT"],
        memory_BSD,
        batch["source_segments_BS"],
        key=fold(key, 1),
        record=parts[1],
        causal=causal,
    )


@functools.partial(jax.jit, static_argnames="causal")
def recorded(
    model: Transformer, batch: dict[str, Array], *, causal: bool = True
) -> tuple[Array, Record]:
    """`forward` without dropout, and all that it computed on the way.

    Returns:
      x_BTD, and a nested dict: record["encoder" or "decoder"] holds embedding_BTD and input_BTD
      (`embed`), and for each of "self_attention", "cross_attention" (decoder) and "feed_forward" a
      dict of arrays stacked over layers, [L, ...]: see `Attention.__call__` and `Block.residual`.
    """
    record: Record = {}
    x_BTD = forward(model, batch, record=record, causal=causal)
    return x_BTD, record


def lens(model: Transformer, stream_LBTD: Array) -> Array:
    """The logit lens (nostalgebraist 2020): what each layer's stream would say: [L, B, T, V].

    The decoder's stream after each layer, read by the final norm (where there is one) and output
    layer.
    """
    norm = model.decoder.norm
    read = stream_LBTD if norm is None else jax.vmap(norm)(stream_LBTD)
    return jax.vmap(lambda x_BTD: logits(model, x_BTD))(read)


def logits(model: Transformer, x_BTD: Array) -> Array:
    """The score of each token of the vocabulary: float32 [B, T, V]."""
    return jnp.einsum(
        "btd,vd->btv",
        x_BTD,
        weight(output_table(model), x_BTD.dtype),
        preferred_element_type=jnp.float32,
        out_sharding=spec("batch", "length", "vocab"),
    )
