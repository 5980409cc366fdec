"""The parts of a Transformer layer: norms, attention, feed-forward, and the block of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxformer.attention import Mask, attention
from jaxformer.attention.dropout import dropout
from jaxformer.attention.extras import Extras
from jaxformer.attention.reference import scores_BHTS, softmax
from jaxformer.config import ModelConfig, head_dim, kv_heads
from jaxformer.model.positions import rotate
from jaxformer.sharding import flat_tokens, gathered, rows_of_tokens, spec

NORM_EPSILON = 1e-6

Record = dict[str, Any]
"""Intermediate values by name, filled in by the functions that compute them.

A caller who wants to look hands in an empty one; None, everywhere the default, leaves the program
as it is. It is an ordinary dict of traced arrays: inside `jax.jit`, return it with the result.
"""

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "swiglu": jax.nn.silu}


def fold(key: Array | None, data: int | Array) -> Array | None:
    """A key of its own for a part of the model; None (no dropout) stays None."""
    return None if key is None else jax.random.fold_in(key, data)


def xavier(key: Array, shape: tuple[int, ...], fans: tuple[int, int], *axes: str | None):
    """A parameter drawn uniformly with variance 2 / (fan_in + fan_out).

    Glorot & Bengio (2010).
    """
    bound = (6 / sum(fans)) ** 0.5
    draw = jax.random.uniform(
        key, shape, jnp.float32, minval=-bound, maxval=bound, out_sharding=spec(*axes)
    )
    return nnx.Param(draw)


def constant(value: float, shape: tuple[int, ...], *axes: str | None) -> nnx.Param:
    """A parameter that starts at one value everywhere: norms and biases."""
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=spec(*axes)))


def weight(parameter: nnx.Param, dtype: jnp.dtype) -> Array:
    """The float32 master weight, cast for computing and then gathered from its fsdp shards."""
    return gathered(parameter[...].astype(dtype))


def linear(x_BTI: Array, kernel_IO: Array, *axes: str | None) -> Array:
    """The matrix product of each position's features, [B, T, I], with [I, ...]: [B, T, ...].

    `axes` are the logical axes of the result's features.

    Positions and features are flattened first, because XLA:CPU computes the gradient of a product
    of matrices at twice the speed of the same sum over three axes (53 against 101 ms for a
    feed-forward layer of width 256, 4,096 positions, 2 cores).
    """
    B, T, I = x_BTI.shape
    kernel = kernel_IO.reshape(I, -1)
    y_nO = jnp.matmul(flat_tokens(x_BTI), kernel, out_sharding=spec("tokens", axes[0]))
    y_BTO = rows_of_tokens(y_nO, B)
    return y_BTO.reshape(B, T, *kernel_IO.shape[1:], out_sharding=spec("batch", "length", *axes))


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the features."""

    def __init__(self, config: ModelConfig):
        self.scale_D = constant(1.0, (config.d_model,), None)
        self.bias_D = constant(0.0, (config.d_model,), None) if config.norm == "layer" else None

    def __call__(self, x_BTD: Array) -> Array:
        """Normalises each position by itself, in float32; [B, T, D] in the type of x."""
        x32 = x_BTD.astype(jnp.float32)
        if self.bias_D is not None:
            x32 -= x32.mean(-1, keepdims=True)
        x32 *= jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + NORM_EPSILON)
        x32 *= self.scale_D[...][None, None, :]
        if self.bias_D is not None:
            x32 += self.bias_D[...][None, None, :]
        return x32.astype(x_BTD.dtype)


class Attention(nnx.Module):
    """The projections of multi-head attention (Vaswani et al. 2017, section 3.2.2).

    With fewer heads of keys and values than of queries it is grouped-query attention (Ainslie et
    al. 2023).
    """

    def __init__(self, config: ModelConfig, key: Array):
        self.dropout = config.attention_dropout
        self.context_keys = config.context_keys
        D, H, G, K = config.d_model, config.num_heads, kv_heads(config), head_dim(config)
        keys = jax.random.split(key, 4)
        self.query_DHK = xavier(keys[0], (D, H, K), (D, H * K), "embed", "heads", None)
        self.key_DGK = xavier(keys[1], (D, G, K), (D, G * K), "embed", "heads", None)
        self.value_DGK = xavier(keys[2], (D, G, K), (D, G * K), "embed", "heads", None)
        self.output_HKD = xavier(keys[3], (H, K, D), (H * K, D), "heads", None, "embed")
        self.query_bias_HK = constant(0.0, (H, K), "heads", None) if config.bias else None
        self.key_bias_GK = constant(0.0, (G, K), "heads", None) if config.bias else None
        self.value_bias_GK = constant(0.0, (G, K), "heads", None) if config.bias else None
        self.output_bias_D = constant(0.0, (D,), None) if config.bias else None

    def queries(self, x_BTD: Array) -> Array:
        """q_BTHK."""
        return _project(x_BTD, self.query_DHK, self.query_bias_HK)

    def keys_values(self, x_BSD: Array) -> tuple[Array, Array]:
        """k_BSGK and v_BSGK."""
        return (
            _project(x_BSD, self.key_DGK, self.key_bias_GK),
            _project(x_BSD, self.value_DGK, self.value_bias_GK),
        )

    def output(self, heads_BTHK: Array) -> Array:
        """Mixes the heads back into the features: [B, T, D]."""
        dtype = heads_BTHK.dtype
        B, T, H, K = heads_BTHK.shape
        kernel = weight(self.output_HKD, dtype).reshape(H * K, -1)
        out_BTD = linear(heads_BTHK.reshape(B, T, H * K), kernel, None)
        if self.output_bias_D is not None:
            out_BTD += self.output_bias_D[...].astype(dtype)[None, None, :]
        return out_BTD

    def __call__(
        self,
        x_BTD: Array,
        memory_BSD: Array,
        mask: Mask,
        rotation: tuple[Array, Array] | None = None,
        key: Array | None = None,
        record: Record | None = None,
    ) -> Array:
        """Every position of x attends to every allowed position of memory: [B, T, D].

        With x as its own memory it is self-attention, and then `rotation` may turn queries and keys
        by their positions.

        A `record` receives q_BTHK, k_BSGK (after the turn), v_BSGK, scores_BHTS before the mask,
        allowed_BTS, weights_BHTS (before dropout) and heads_BTHK; the heads are then computed by
        `reference`, from those weights.
        """
        q_BTHK = self.queries(x_BTD)
        k_BSGK, v_BSGK = self.keys_values(memory_BSD)
        if rotation is not None:
            q_BTHK, k_BSGK = rotate(q_BTHK, rotation), rotate(k_BSGK, rotation)
        drop = (self.dropout, key) if key is not None and self.dropout else None
        if record is None:
            heads_BTHK = attention(
                q_BTHK, k_BSGK, v_BSGK, mask, dropout=drop, context_keys=self.context_keys
            )
            return self.output(heads_BTHK)
        heads_BTHK = attention(
            q_BTHK, k_BSGK, v_BSGK, mask, dropout=drop, implementation="reference"
        )
        scores = scores_BHTS(q_BTHK, k_BSGK, Extras())
        T, S = scores.shape[2:]
        record |= {"q_BTHK": q_BTHK, "k_BSGK": k_BSGK, "v_BSGK": v_BSGK, "heads_BTHK": heads_BTHK}
        record |= {"scores_BHTS": scores, "weights_BHTS": softmax(scores, mask, Extras())[0]}
        record["allowed_BTS"] = mask.allowed_BTS(T, S)
        return self.output(heads_BTHK)


def _project(x_BTD: Array, kernel_DHK: nnx.Param, bias_HK: nnx.Param | None) -> Array:
    y_BTHK = linear(x_BTD, weight(kernel_DHK, x_BTD.dtype), "heads", None)
    if bias_HK is not None:
        y_BTHK += bias_HK[...].astype(x_BTD.dtype)[None, None]
    return y_BTHK


class FeedForward(nnx.Module):
    """Two linear maps with a non-linearity between, at every position alike (section 3.3).

    `swiglu` gates the hidden layer with a second map (Shazeer 2020).
    """

    def __init__(self, config: ModelConfig, key: Array):
        D, F = config.d_model, config.d_ff
        self.activation = config.activation
        up, gate, down = jax.random.split(key, 3)
        gated = config.activation == "swiglu"
        self.up_DF = xavier(up, (D, F), (D, F), "embed", "ffn")
        self.gate_DF = xavier(gate, (D, F), (D, F), "embed", "ffn") if gated else None
        self.down_FD = xavier(down, (F, D), (F, D), "ffn", "embed")
        self.up_bias_F = constant(0.0, (F,), "ffn") if config.bias else None
        self.down_bias_D = constant(0.0, (D,), None) if config.bias else None

    def __call__(self, x_BTD: Array) -> Array:
        """[B, T, D] to [B, T, D], each position by itself."""
        dtype = x_BTD.dtype
        hidden_BTF = linear(x_BTD, weight(self.up_DF, dtype), "ffn")
        if self.up_bias_F is not None:
            hidden_BTF += self.up_bias_F[...].astype(dtype)[None, None, :]
        activate = ACTIVATIONS[self.activation]
        if self.gate_DF is None:
            hidden_BTF = activate(hidden_BTF)
        else:
            gate_BTF = linear(x_BTD, weight(self.gate_DF, dtype), "ffn")
            hidden_BTF *= activate(gate_BTF)
        out_BTD = linear(hidden_BTF, weight(self.down_FD, dtype), None)
        if self.down_bias_D is not None:
            out_BTD += self.down_bias_D[...].astype(dtype)[None, None, :]
        return out_BTD


class Block(nnx.Module):
    """One layer: self-attention, optionally cross-attention, feed-forward, each on a residual.

    An encoder layer is a block without cross-attention and with a mask that is not causal; a layer
    of a decoder-only language model is one without cross-attention and with a causal mask.
    """

    def __init__(self, config: ModelConfig, cross_attention: bool, key: Array):
        self.pre_norm = config.norm_position == "pre"
        self.dropout = config.dropout
        keys = jax.random.split(key, 3)
        self.self_attention = Attention(config, keys[0])
        self.self_attention_norm = Norm(config)
        self.cross_attention = Attention(config, keys[1]) if cross_attention else None
        self.cross_attention_norm = Norm(config) if cross_attention else None
        self.feed_forward = FeedForward(config, keys[2])
        self.feed_forward_norm = Norm(config)

    def residual(
        self,
        x_BTD: Array,
        norm: Norm,
        sublayer,
        key: Array | None,
        record: Record | None = None,
    ) -> Array:
        """x + dropout(sublayer(x)), normalised after the sum (the paper) or before the sub-layer.

        Pre-norm keeps the path from input to output free of norms (Xiong et al. 2020).

        A `record` receives added_BTD, what the sub-layer adds, and stream_BTD, the result.
        """
        added_BTD = sublayer(norm(x_BTD) if self.pre_norm else x_BTD)
        x_BTD += dropout(added_BTD, self.dropout, key)
        if not self.pre_norm:
            x_BTD = norm(x_BTD)
        if record is not None:
            record |= {"added_BTD": added_BTD, "stream_BTD": x_BTD}
        return x_BTD

    def __call__(
        self,
        x_BTD: Array,
        mask: Mask,
        rotation: tuple[Array, Array] | None = None,
        memory: tuple[Array, Mask] | None = None,
        key: Array | None = None,
        record: Record | None = None,
    ) -> Array:
        """[B, T, D] to [B, T, D]; `memory` is (memory_BSD, its mask) for cross-attention.

        A `record` receives a record for each of self_attention, cross_attention and feed_forward.
        """

        def part(name: str) -> Record | None:
            return None if record is None else record.setdefault(name, {})

        own = part("self_attention")

        def attend_to_self(y_BTD: Array) -> Array:
            return self.self_attention(y_BTD, y_BTD, mask, rotation, fold(key, 0), own)

        x_BTD = self.residual(x_BTD, self.self_attention_norm, attend_to_self, fold(key, 1), own)
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            assert memory is not None
            attend, norm = self.cross_attention, self.cross_attention_norm
            cross = part("cross_attention")

            def attend_to_memory(y_BTD: Array) -> Array:
                return attend(y_BTD, memory[0], memory[1], None, fold(key, 2), cross)

            x_BTD = self.residual(x_BTD, norm, attend_to_memory, fold(key, 3), cross)
        return self.residual(
            x_BTD, self.feed_forward_norm, self.feed_forward, fold(key, 4), part("feed_forward")
        )
