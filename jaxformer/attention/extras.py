"""What a call of attention may ask for besides queries, keys, values and mask."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxformer.attention.dropout import keep_at, words_of
from jaxformer.attention.mask import distances_TS

NOTHING = -1e30
"""The log-sum-exp of a query that may look at nothing: finite, so that differences are too."""

_static = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extras:
    """The options of one call, and where its arrays stand in the whole ones.

    Scores are built in this order: q k / sqrt(K), soft cap, bias, ALiBi, mask. On one device the
    arrays of a call are the whole ones; under a mesh each device has a part, and order, window,
    ALiBi and dropout go by places in the whole.
    """

    bias_BHTS: Array | None = None
    """Added to the scores, [B or 1, H, T, S]."""
    slopes_H: Array | None = None
    """ALiBi (Press et al. 2022): minus slope times distance is added; float32 [H], no gradient."""
    words_2: Array | None = None
    """The words of the dropout key, uint32 [2]; None without dropout."""
    origin_4: Array | None = None
    """Row, head, query and key of the whole arrays that are first here, int32; None is zeros."""
    soft_cap: float | None = dataclasses.field(default=None, metadata=_static)
    """c in c tanh(score / c) (Gemma 2, 2024)."""
    rate: float = dataclasses.field(default=0.0, metadata=_static)
    """The share of the weights that dropout zeroes."""
    heads: int = dataclasses.field(default=0, metadata=_static)
    """Heads of queries in the whole."""
    keys: int = dataclasses.field(default=0, metadata=_static)
    """Length of the keys in the whole."""
    shifted: bool = dataclasses.field(default=False, metadata=_static)
    """Whether the first query and the first key may stand at different places of their rows."""

    @classmethod
    def of(
        cls,
        heads: int,
        keys: int,
        bias: Array | None = None,
        alibi: Array | None = None,
        soft_cap: float | None = None,
        dropout: tuple[float, Array] | None = None,
    ) -> Extras:
        """From the arguments of `attention`, for arrays that are whole."""
        rate, key = dropout if dropout is not None else (0.0, None)
        words = jnp.stack(words_of(key)) if key is not None and rate else None
        slopes_H = None if alibi is None else jax.lax.stop_gradient(alibi.astype(jnp.float32))
        return cls(
            bias, slopes_H, words, None, soft_cap, rate if words is not None else 0.0, heads, keys
        )

    @property
    def first(self) -> Array:
        """`origin_4`, with zeros for None."""
        return jnp.zeros(4, jnp.int32) if self.origin_4 is None else self.origin_4

    def added(self, scores_BHTS: Array) -> Array:
        """The scores with soft cap, bias and ALiBi."""
        if self.soft_cap is not None:
            scores_BHTS = self.soft_cap * jnp.tanh(scores_BHTS / self.soft_cap)
        if self.bias_BHTS is not None:
            scores_BHTS += self.bias_BHTS.astype(jnp.float32)
        if self.slopes_H is not None:
            distances = distances_TS(*scores_BHTS.shape[2:], *self.first[2:])
            away_TS = abs(distances).astype(jnp.float32)
            scores_BHTS -= (self.slopes_H[:, None, None] * away_TS[None])[None]
        return scores_BHTS

    def dropped(self, weights_BHTS: Array) -> Array:
        """The weights after dropout, scaled up."""
        if self.words_2 is None:
            return weights_BHTS
        B, H, T, S = weights_BHTS.shape
        row, head, query, key = self.first
        outer_BH = (row + jnp.arange(B))[:, None] * self.heads + (head + jnp.arange(H))[None]
        inner_TS = (query + jnp.arange(T))[:, None] * self.keys + (key + jnp.arange(S))[None]
        outer, inner = outer_BH[:, :, None, None], inner_TS[None, None]
        kept = keep_at((self.words_2[0], self.words_2[1]), self.rate, outer, inner)
        scaled = weights_BHTS * jnp.asarray(1 / (1 - self.rate), weights_BHTS.dtype)
        return jnp.where(kept, scaled, jnp.zeros((), weights_BHTS.dtype))

    def refuse(self, who: str, *names: str) -> None:
        """Raises NotImplementedError if the call asks for one of these ("a bias", ...)."""
        asked = {
            "a bias": self.bias_BHTS is not None,
            "ALiBi": self.slopes_H is not None,
            "a soft cap": self.soft_cap is not None,
            "dropout": self.words_2 is not None,
            "an origin": self.origin_4 is not None,
        }
        for name in names:
            if asked[name]:
                raise NotImplementedError(f"{who} attention has no {name.split()[-1]}")
