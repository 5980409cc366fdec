import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.attention import Mask

T, S = 5, 7

ids = st.integers(0, 3)


@settings(deadline=None, max_examples=40)
@given(
    q_segments=st.none() | st.lists(st.lists(ids, min_size=T, max_size=T), min_size=2, max_size=2),
    kv_segments=st.lists(st.lists(ids, min_size=S, max_size=S), min_size=2, max_size=2),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 8),
)
def test_the_drawn_mask_is_the_described_one(q_segments, kv_segments, causal, window):
    if q_segments is None:
        mask, rows = Mask(causal=causal, window=window), [(None, None)]
    else:
        mask = Mask(
            jnp.asarray(q_segments, jnp.int32), jnp.asarray(kv_segments, jnp.int32), causal, window
        )
        rows = list(zip(q_segments, kv_segments, strict=True))
    drawn = mask.allowed_BTS(T, S)
    if drawn is None:  # everything is allowed
        drawn = np.ones((1, T, S), bool)
    wanted = np.stack([reference.allowed_pairs(T, S, q, kv, causal, window) for q, kv in rows])
    np.testing.assert_array_equal(drawn, wanted)


def test_no_restriction_draws_no_picture():
    assert Mask().allowed_BTS(T, S) is None


def test_segments_of_one_side_only_are_refused():
    with pytest.raises(ValueError, match="queries and keys"):
        Mask(q_segments_BT=jnp.ones((1, T), jnp.int32))
