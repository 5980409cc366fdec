"""Every implementation of attention against float64, in one suite.

An implementation may refuse a feature with NotImplementedError, if `REFUSALS` says so. A refusal
that is not listed fails, and so does a listed one that no longer happens.
"""

import dataclasses
import functools
import logging
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jaxformer.attention as module
from jaxformer.attention import IMPLEMENTATIONS, Mask, attention
from jaxformer.attention.dropout import keep

# Features of a call: "bias", "dropout", "window", "causal", "segments", "grouped", "cross" (T is
# not S), the type ("float32", "bfloat16") and the backend ("cpu", "gpu", "tpu").
REFUSALS: dict[str, set[str]] = {
    "dense": {"bias", "grouped"},
    "reference": set(),
}

# Largest difference from float64, as a share of the largest float64 value of that array.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}

KEY = jax.random.key(17)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    T: int = 7
    S: int = 7
    H: int = 2
    G: int = 2
    K: int = 32
    B: int = 2
    causal: bool = False
    window: int | None = None
    segments: int = 0  # sentences packed in each row; the rest is padding
    bias: int = 0  # rows of the bias: 0 (none), 1 or B
    dropout: float = 0.0
    dtype: str = "float32"

    @property
    def features(self) -> set[str]:
        present = {
            "bias": self.bias,
            "dropout": self.dropout,
            "window": self.window,
            "causal": self.causal,
            "segments": self.segments,
            "grouped": self.G != self.H,
            "cross": self.T != self.S,
        }
        named = {name for name, there in present.items() if there}
        return named | {self.dtype, jax.default_backend()}


CASES = [
    Case("plain"),
    Case("one query, one key", T=1, S=1),
    Case("one query", T=1, S=127, K=64),
    Case("one key", T=127, S=1),
    Case("causal", T=129, S=129, causal=True, K=64),
    Case("cross, long keys", T=7, S=129, segments=2),
    Case("cross, long queries", T=129, S=33, segments=3, K=64),
    Case("packed", T=64, S=64, segments=3, K=64),
    Case("packed, causal, odd", T=127, S=127, segments=4, causal=True),
    Case("heads of 128", T=17, S=33, K=128),
    Case("heads of 256", T=33, S=33, causal=True, K=256),
    Case("grouped", T=16, S=16, H=4, G=2),
    Case("one head of keys", T=15, S=31, H=4, G=1, segments=2),
    Case("bias of all rows", T=16, S=16, bias=1),
    Case("bias of each row", T=9, S=17, bias=2, segments=2),
    Case("window", T=33, S=33, window=5),
    Case("window, causal", T=33, S=33, window=4, causal=True),
    Case("dropout", T=33, S=33, dropout=0.3),
    Case("dropout, packed, causal", T=65, S=65, dropout=0.1, segments=3, causal=True),
    Case(
        "everything", T=31, S=31, H=4, G=2, causal=True, window=9, segments=3, bias=2, dropout=0.2
    ),
    Case("bfloat16", T=64, S=64, segments=2, causal=True, K=64, dtype="bfloat16"),
    Case("bfloat16, cross, dropout", T=17, S=33, dropout=0.1, dtype="bfloat16"),
]


@functools.cache
def inputs(case: Case):
    """(q, k, v, gradient of the output), bias or None, Mask."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    B, T, S, H, G, K = case.B, case.T, case.S, case.H, case.G, case.K
    shapes = [(B, T, H, K), (B, S, G, K), (B, S, G, K), (B, T, H, K)]
    arrays = [rng.standard_normal(shape).astype(jnp.dtype(case.dtype)) for shape in shapes]
    bias = rng.standard_normal((case.bias, H, T, S)).astype(np.float32) if case.bias else None
    q_segments = kv_segments = None
    if case.segments:
        q_segments = segments(rng, B, T, case.segments)
        kv_segments = q_segments if T == S else segments(rng, B, S, case.segments)
    return arrays, bias, Mask(q_segments, kv_segments, causal=case.causal, window=case.window)


def segments(rng, B, length, count):
    """Ids 1..count in runs of random lengths, then padding."""
    rows = np.zeros((B, length), np.int32)
    for row in rows:
        ends = [0, *np.sort(rng.permutation(length)[:count])]
        for segment in range(1, count + 1):
            row[ends[segment - 1] : ends[segment]] = segment
    return rows


@functools.cache
def truth(case: Case):
    """Output and gradients for (q, k, v, bias), in float64 by the formula."""
    (q, k, v, out_grad), bias, mask = inputs(case)
    q, k, v, out_grad = (np.asarray(x, np.float64) for x in (q, k, v, out_grad))
    factors = np.ones((case.B, case.H, case.T, case.S))
    if case.dropout:
        factors = np.asarray(keep(KEY, case.dropout, factors.shape)) / (1 - case.dropout)
    bias_grad = np.zeros((case.bias, case.H, case.T, case.S))
    out, grads = [], []
    for b in range(case.B):
        ids = (None, None)
        if mask.q_segments_BT is not None:
            ids = (np.asarray(mask.q_segments_BT[b]), np.asarray(mask.kv_segments_BS[b]))
        allowed = reference.allowed_pairs(case.T, case.S, *ids, case.causal, case.window)
        added = None if bias is None else np.asarray(bias, np.float64)[b % case.bias]
        out.append(reference.attention(q[b], k[b], v[b], allowed, added, factors[b]))
        *qkv, row_bias_grad = reference.attention_gradients(
            q[b], k[b], v[b], allowed, out_grad[b], added, factors[b]
        )
        grads.append(qkv)
        if case.bias:
            bias_grad[b % case.bias] += row_bias_grad
    gradients = [np.stack([row[i] for row in grads]) for i in range(3)]
    return np.stack(out), gradients + ([bias_grad] if case.bias else [])


def compute(name: str, case: Case):
    """Output and gradients for (q, k, v[, bias]) of the named implementation."""
    (q, k, v, out_grad), bias, mask = inputs(case)
    drop = (case.dropout, KEY) if case.dropout else None

    def call(q, k, v, *bias):
        added = bias[0] if bias else None
        return attention(q, k, v, mask, bias=added, dropout=drop, implementation=name)

    @jax.jit
    def run(out_grad, *primals):
        out, pull = jax.vjp(call, *primals)
        return out, pull(out_grad)

    return run(out_grad, q, k, v, *([] if bias is None else [bias]))


def error(got, wanted) -> float:
    got = np.asarray(got, np.float64)
    assert got.shape == wanted.shape
    return float(abs(got - wanted).max() / max(abs(wanted).max(), 1e-30))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_output_and_gradients_are_those_of_float64(name, case):
    if REFUSALS[name] & case.features:
        with pytest.raises(NotImplementedError, match=name):
            compute(name, case)
        return
    out, gradients = compute(name, case)
    wanted_out, wanted_gradients = truth(case)
    assert out.dtype == jnp.dtype(case.dtype)
    assert error(out, wanted_out) <= TOLERANCE[case.dtype]
    names = ("q", "k", "v", "bias")[: len(gradients)]
    for which, got, wanted in zip(names, gradients, wanted_gradients, strict=True):
        assert error(got, wanted) <= 2 * TOLERANCE[case.dtype], which


def test_the_float64_gradients_are_slopes_of_the_float64_output():
    case = next(case for case in CASES if case.name == "bias of each row")
    (q, k, v, out_grad), bias, mask = inputs(case)
    rng = np.random.default_rng(0)
    ids = (np.asarray(mask.q_segments_BT[1]), np.asarray(mask.kv_segments_BS[1]))
    allowed = reference.allowed_pairs(case.T, case.S, *ids)
    factor = rng.uniform(0, 2, (case.H, case.T, case.S))
    at = [np.asarray(x[1], np.float64) for x in (q, k, v, bias)]
    pull = np.asarray(out_grad[1], np.float64)
    gradients = reference.attention_gradients(*at[:3], allowed, pull, at[3], factor)
    for i, gradient in enumerate(gradients):
        direction = rng.standard_normal(at[i].shape)

        def value(step, i=i, direction=direction):
            moved = [x + step * direction if i == j else x for j, x in enumerate(at)]
            out = reference.attention(*moved[:3], allowed, moved[3], factor)
            return (pull * out).sum()

        slope = (value(1e-5) - value(-1e-5)) / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-7)


def features_of_blind_case(name: str) -> set[str]:
    return {"segments", "cross", "float32", jax.default_backend()} & REFUSALS[name]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_sees_nothing_gives_zero_and_what_is_not_seen_has_no_say(name):
    """Row 0 is padding only; in row 1, segment 1 has no keys, and keys of segment 3 no queries."""
    if features_of_blind_case(name):
        pytest.skip("refused: see REFUSALS")
    q_segments = jnp.asarray([[0] * 5, [1, 1, 2, 2, 0]], jnp.int32)
    kv_segments = jnp.asarray([[0] * 6, [2, 3, 2, 2, 3, 0]], jnp.int32)
    blind, unseen = np.asarray(q_segments) != 2, np.asarray(kv_segments) != 2
    rng = np.random.default_rng(1)
    q, k, v, out_grad = (
        jnp.asarray(rng.standard_normal((2, n, 2, 32)), jnp.float32) for n in (5, 6, 6, 5)
    )

    @jax.jit
    def run(q, k, v):
        mask = Mask(q_segments, kv_segments)
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, mask, implementation=name), q, k, v)
        return out, *pull(out_grad)

    out, q_grad, k_grad, v_grad = (np.asarray(x) for x in run(q, k, v))
    assert (out[blind] == 0).all()
    assert (out[~blind] != 0).all()
    assert (q_grad[blind] == 0).all()
    assert (q_grad[~blind] != 0).all()
    for gradient in (k_grad, v_grad):
        assert (gradient[unseen] == 0).all()
        assert (gradient[~unseen] != 0).all()

    loud = jnp.asarray(unseen)[:, :, None, None]
    other = run(q, jnp.where(loud, 1e4, k), jnp.where(loud, -1e4, v))
    for before, after in zip((out, q_grad, k_grad, v_grad), other, strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_scores_in_the_thousands_do_not_overflow(name):
    if {"float32", jax.default_backend()} & REFUSALS[name]:
        pytest.skip("refused: see REFUSALS")
    rng = np.random.default_rng(2)
    q, k, v = (60 * rng.standard_normal((1, 8, 1, 32)) for _ in range(3))
    rounded = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    assert abs(np.einsum("btk,bsk->bts", q[:, :, 0], k[:, :, 0])).max() / 32**0.5 > 2_000
    out = jax.jit(lambda *qkv: attention(*qkv, Mask(causal=True), implementation=name))(*rounded)
    exact = (np.asarray(x[0], np.float64) for x in rounded)
    wanted = reference.attention(*exact, reference.allowed_pairs(8, 8, causal=True))
    assert error(out[0], wanted) <= 1e-3  # a score of 2^12 is known to 2^-12


def refuses(*_, **__):
    raise NotImplementedError("not today")


def test_the_first_that_does_not_refuse_serves_and_says_so_once(monkeypatch, caplog):
    chosen = {"shy": refuses, "willing": IMPLEMENTATIONS["reference"], "late": refuses}
    monkeypatch.setattr(module, "IMPLEMENTATIONS", chosen)
    module._log_once.cache_clear()
    (q, k, v, _), _, mask = inputs(CASES[0])
    with caplog.at_level(logging.INFO, logger="jaxformer.attention"):
        out = [attention(q, k, v, mask) for _ in range(2)]
    np.testing.assert_array_equal(out[0], attention(q, k, v, mask, implementation="willing"))
    assert [record.getMessage() for record in caplog.records] == [
        "attention is computed by 'willing'"
    ]


def test_a_named_implementation_that_refuses_is_not_replaced(monkeypatch):
    chosen = {"shy": refuses, "willing": IMPLEMENTATIONS["reference"]}
    monkeypatch.setattr(module, "IMPLEMENTATIONS", chosen)
    (q, k, v, _), _, mask = inputs(CASES[0])
    with pytest.raises(NotImplementedError, match="shy: not today"):
        attention(q, k, v, mask, implementation="shy")


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((1, 2, 4, 8), (1, 3, 4, 8), (1, 2, 4, 8)),
        ((1, 2, 4, 8), (1, 3, 3, 8), (1, 3, 3, 8)),
        ((1, 2, 4, 8), (1, 3, 4, 6), (1, 3, 4, 6)),
    ],
    ids=["keys and values", "heads", "head sizes"],
)
def test_shapes_that_do_not_fit_are_refused(q, k, v):
    with pytest.raises(ValueError, match="attention got queries"):
        attention(jnp.zeros(q), jnp.zeros(k), jnp.zeros(v), Mask())
