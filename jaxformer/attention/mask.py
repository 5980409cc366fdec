"""Who may look at whom, described instead of drawn."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """A description of the allowed (query, key) pairs; the B x T x S picture is never stored.

    A pair is allowed when all of these hold:
      * both segment ids are equal and not 0 (segment 0 is padding),
      * with `causal`, the key does not come after the query,
      * with `window`, the key is fewer than `window` places away from the query.
    Absent segments count as one segment that fills the row.
    """

    q_segments_BT: Array | None = None
    kv_segments_BS: Array | None = None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        if (self.q_segments_BT is None) != (self.kv_segments_BS is None):
            raise ValueError("Mask needs segment ids for queries and keys, or for neither.")

    def allowed_BTS(
        self, length_T: int, length_S: int, first_query: int | Array = 0, first_key: int | Array = 0
    ) -> Array | None:
        """The allowed pairs, bool [B or 1, T, S]; None when every pair is allowed.

        Queries and keys may be parts of longer rows that begin at `first_query` and `first_key`.
        """
        allowed = None
        if self.q_segments_BT is not None and self.kv_segments_BS is not None:
            q_BT1 = self.q_segments_BT[:, :, None]
            allowed = (q_BT1 == self.kv_segments_BS[:, None, :]) & (q_BT1 != 0)
        if self.causal or self.window is not None:
            distance_TS = distances_TS(length_T, length_S, first_query, first_key)
            near = jnp.ones((length_T, length_S), bool)
            if self.causal:
                near &= distance_TS >= 0
            if self.window is not None:
                near &= abs(distance_TS) < self.window
            allowed = near[None] if allowed is None else allowed & near[None]
        return allowed


def distances_TS(length_T: int, length_S: int, first_query=0, first_key=0) -> Array:
    """How many places each key stands before each query, int32 [T, S]."""
    query_T = first_query + jnp.arange(length_T, dtype=jnp.int32)
    key_S = first_key + jnp.arange(length_S, dtype=jnp.int32)
    return query_T[:, None] - key_S[None, :]
