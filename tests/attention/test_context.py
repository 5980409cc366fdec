"""Rows cut over devices: a ring of keys, or all keys gathered, is attention on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import REFUSALS, Case, error, inputs, slopes
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer.attention import IMPLEMENTATIONS, Mask, attention

KEY = jax.random.key(5)
ROW = P("data", "context", "tensor", None)
PACKED = Case("packed", T=32, S=32, H=4, G=4, causal=True, segments=3, dropout=0.2)
CROSS = Case("cross", T=16, S=48, H=4, G=4, segments=2)
RICH = Case("rich", T=32, S=32, H=4, G=2, causal=True, window=11, alibi=True, soft_cap=2.0)


def run(name: str, case: Case, keys: str, place):
    """Output, log-sum-exp and gradients, with `place` laying out each array."""
    (q, k, v, out_grad), _, mask = inputs(case)
    if case.segments:
        ids = (mask.q_segments_BT, mask.kv_segments_BS)
        ids = [place(x, P("data", "context")) for x in ids]
        mask = Mask(*ids, causal=case.causal, window=case.window)
    alibi = None if slopes(case) is None else jnp.asarray(slopes(case))
    drop = (case.dropout, KEY) if case.dropout else None
    lse_grad = np.linspace(-1, 1, case.B * case.H * case.T, dtype=np.float32)
    lse_grad = lse_grad.reshape(case.B, case.H, case.T)

    @jax.jit
    def both(out_grad, lse_grad, q, k, v):
        def call(q, k, v):
            return attention(
                q, k, v, mask, alibi=alibi, soft_cap=case.soft_cap, dropout=drop,
                implementation=name, context_keys=keys, return_lse=True,
            )  # fmt: skip

        (out, lse), pull = jax.vjp(call, q, k, v)
        # A query without keys has -1e30 instead of a log-sum-exp; it has no gradient.
        return out, jnp.where(lse < -1e29, 0.0, lse), pull((out_grad, lse_grad))

    arrays = [place(x, ROW) for x in (q, k, v)]
    lse_grad = place(jnp.asarray(lse_grad), P("data", "tensor", "context"))
    return both(place(out_grad, ROW), lse_grad, *arrays)


@functools.cache
def alone(name: str, case: Case):
    """On one device."""
    return run(name, case, "ring", lambda x, _: jnp.asarray(x))


# A ring needs of an implementation the log-sum-exp, its gradient, and places in the whole: the
# first and the last case. What is gathered needs only the places.
CUT = [
    *((name, "ring", case) for name in IMPLEMENTATIONS for case in (PACKED, RICH)),
    *((name, "gather", PACKED) for name in IMPLEMENTATIONS),
    *(("blockwise", *how) for how in (("ring", CROSS), ("gather", CROSS), ("gather", RICH))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keys", "case"), CUT, ids=lambda x: getattr(x, "name", x))
def test_rows_cut_over_devices_give_what_one_device_gives(name, keys, case):
    if case.features & REFUSALS[name]:
        pytest.skip("refused: see REFUSALS")
    mesh = jax.make_mesh((1, 2, 4), ("data", "tensor", "context"), (AxisType.Explicit,) * 3)
    with jax.set_mesh(mesh):
        spread = run(name, case, keys, lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)))
    leaves = jax.tree.leaves(spread), jax.tree.leaves(alone(name, case))
    for got, wanted in zip(*leaves, strict=True):
        assert error(got, np.asarray(wanted)) <= 2e-6


def program(keys: str, devices: int, T: int = 16384):
    """The compiled gradient of causal attention over one long row."""
    mesh = jax.make_mesh(
        (devices,), ("context",), (AxisType.Explicit,), devices=jax.devices()[:devices]
    )
    layout = NamedSharding(mesh, P(None, "context" if devices > 1 else None, None, None))
    x = jax.ShapeDtypeStruct((1, T, 2, 32), np.float32, sharding=layout)

    def loss(q, k, v):
        out = attention(q, k, v, Mask(causal=True), implementation="blockwise", context_keys=keys)
        return jnp.square(out).sum()

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()


def test_a_ring_holds_parts_of_the_keys_only():
    ring, gather = (program(keys, 8) for keys in ("ring", "gather"))
    assert "all-gather" in gather.as_text()
    assert "all-gather" not in ring.as_text()
    assert "collective-permute" in ring.as_text()
    ring_bytes, gather_bytes = (p.memory_analysis().temp_size_in_bytes for p in (ring, gather))
    assert ring_bytes < 0.6 * gather_bytes


def test_a_bias_does_not_go_round_a_ring():
    mesh = jax.make_mesh((8,), ("context",), (AxisType.Explicit,))
    x = jnp.zeros((1, 16, 2, 8))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P(None, "context", None, None)))
        bias = jnp.zeros((1, 2, 16, 16))
        with pytest.raises(NotImplementedError, match="ring attention has no bias"):
            attention(x, x, x, Mask(), bias=bias, implementation="reference")


def test_a_head_split_over_devices_is_refused():
    mesh = jax.make_mesh((8,), ("tensor",), (AxisType.Explicit,))
    x = jnp.zeros((1, 16, 2, 8))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P(None, None, None, "tensor")))
        with pytest.raises(NotImplementedError, match="rows, length and heads"):
            attention(x, x, x, Mask())
