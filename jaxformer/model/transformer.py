"""The Transformer of "Attention is all you need" (Vaswani et al. 2017) and its later forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxformer.attention import Mask
from jaxformer.attention.dropout import dropout
from jaxformer.attention.platform import platform
from jaxformer.config import ModelConfig, head_dim
from jaxformer.model import positions
from jaxformer.model.layers import Block, Norm, fold, weight
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
    ) -> Array:
        """[B, T, D] through all layers: [B, T, D]."""

        def layer(x_BTD: Array, block_and_index: tuple[Block, Array]) -> tuple[Array, None]:
            block, index = block_and_index
            return block(x_BTD, mask, rotation, memory, fold(key, index)), None

        layers = jax.tree.leaves(self.blocks)[0].shape[0]
        step = jax.checkpoint(layer) if self.remat else layer
        # On the CPU a loop over layers copies what the backward pass needs (10 % of a step);
        # elsewhere it keeps the program, and the time to compile it, independent of depth.
        unroll = platform() == "cpu"
        x_BTD, _ = jax.lax.scan(step, x_BTD, (self.blocks, jnp.arange(layers)), unroll=unroll)
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
) -> Array:
    """Token embeddings times sqrt(D), plus positions, with dropout on the sum: [B, T, D].

    Sections 3.4, 3.5 and 5.4. Rotary positions are added nowhere; they turn queries and keys.
    """
    dtype = jnp.dtype(config.dtype)
    rows = spec("batch", "length", None)
    x_BTD = weight(table_VD, dtype).at[tokens_BT].get(out_sharding=rows)
    x_BTD *= jnp.asarray(config.d_model**0.5, dtype)
    if config.positions == "sinusoidal":
        x_BTD += positions.sinusoidal(positions_BT, config.d_model).astype(dtype)
    elif position_table_TD is not None:
        x_BTD += weight(position_table_TD, dtype).at[positions_BT].get(out_sharding=rows)
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
) -> Array:
    """Reads the source: memory_BSD. `key` turns dropout on."""
    x_BSD = embed(
        model.config,
        model.embedding_VD,
        model.source_positions_TD,
        source_BS,
        positions_BS,
        fold(key, 0),
    )
    mask = Mask(segments_BS, segments_BS)
    return model.encoder(x_BSD, mask, rotation(model.config, positions_BS), key=fold(key, 1))


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
) -> Array:
    """Runs the decoder over known target tokens (teacher forcing): x_BTD, before the output layer.

    Position t sees the tokens up to t of its own segment, and the source of the same segment.
    """
    x_BTD = embed(
        model.config,
        target_table(model),
        model.target_positions_TD,
        inputs_BT,
        positions_BT,
        fold(key, 0),
    )
    return model.decoder(
        x_BTD,
        Mask(segments_BT, segments_BT, causal=True),
        rotation(model.config, positions_BT),
        memory=(memory_BSD, Mask(segments_BT, source_segments_BS)),
        key=fold(key, 1),
    )


def forward(model: Transformer, batch: dict[str, Array], key: Array | None = None) -> Array:
    """Source and target inputs of a packed batch to the decoder's output: x_BTD."""
    memory_BSD = encode(
        model,
        batch["source_BS"],
        batch["source_segments_BS"],
        batch["source_positions_BS"],
        key=fold(key, 0),
    )
    return decode(
        model,
        batch["inputs_BT"],
        batch["target_segments_BT"],
        batch["target_positions_BT"],
        memory_BSD,
        batch["source_segments_BS"],
        key=fold(key, 1),
    )


def logits(model: Transformer, x_BTD: Array) -> Array:
    """The score of each token of the vocabulary: float32 [B, T, V]."""
    return jnp.einsum(
        "btd,vd->btv",
        x_BTD,
        weight(output_table(model), x_BTD.dtype),
        preferred_element_type=jnp.float32,
        out_sharding=spec("batch", "length", "vocab"),
    )
