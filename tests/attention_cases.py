"""Calls of attention, their answers in float64, and what each implementation may refuse."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import reference
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxformer.attention import Mask, attention, lax_blocks, tpu_table
from jaxformer.attention.dropout import keep

# Features of a call: "bias", "alibi", "soft cap", "dropout", "window", "causal", "segments",
# "grouped", "cross" (T is not S), the type and the backend ("cpu", "gpu", "tpu").
REFUSALS: dict[str, set[str]] = {
    "pallas_tpu": set(),
    "pallas_gpu": {"bias", "alibi", "soft cap", "float32"}
    | (set() if hasattr(plgpu, "InterpretGPUParams") else {"cpu"}),
    "blockwise": set(),
    "dense": {"bias", "alibi", "soft cap", "grouped"},
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
    alibi: bool = False
    soft_cap: float | None = None
    lse: bool = False  # the log-sum-exp has a gradient too
    dropout: float = 0.0
    dtype: str = "float32"

    @property
    def features(self) -> set[str]:
        present = {
            "bias": self.bias,
            "alibi": self.alibi,
            "soft cap": self.soft_cap,
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
    Case("cross, long keys", T=7, S=129, segments=2, lse=True),
    Case("cross, long queries", T=129, S=33, segments=3, K=64),
    Case("packed", T=64, S=64, segments=3, K=64),
    Case("packed, causal, odd", T=127, S=127, segments=4, causal=True),
    Case("a thousand, packed", T=1000, S=1000, B=1, segments=20, causal=True, K=64),
    Case("heads of 128", T=17, S=33, K=128),
    Case("heads of 256", T=33, S=33, causal=True, K=256),
    Case("grouped", T=16, S=16, H=4, G=2),
    Case("one head of keys", T=15, S=31, H=4, G=1, segments=2),
    Case("bias of all rows", T=16, S=16, bias=1),
    Case("bias of each row", T=9, S=17, bias=2, segments=2),
    Case("bias, grouped, packed", T=33, S=33, H=4, G=2, bias=1, segments=3, causal=True),
    Case("alibi", T=33, S=33, alibi=True),
    Case("alibi, grouped, packed", T=33, S=33, H=4, G=2, alibi=True, causal=True, segments=3),
    Case("soft cap", T=33, S=33, soft_cap=2.0, K=64),
    Case("soft cap, cross, packed", T=17, S=40, soft_cap=1.5, segments=2),
    Case("log-sum-exp, causal", T=33, S=33, lse=True, causal=True, dropout=0.2),
    Case("window", T=33, S=33, H=4, G=4, K=64, window=5),
    Case("window, causal", T=33, S=33, window=4, causal=True),
    Case("dropout", T=33, S=33, dropout=0.3),
    Case("dropout, packed, causal", T=65, S=65, dropout=0.1, segments=3, causal=True),
    Case(
        "everything",
        T=31,
        S=31,
        H=4,
        G=2,
        causal=True,
        window=9,
        segments=3,
        bias=2,
        alibi=True,
        soft_cap=3.0,
        lse=True,
        dropout=0.2,
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


def slopes(case: Case):
    """Slopes of ALiBi, a different one for each head; None without."""
    return np.float32(0.5) ** np.arange(1, case.H + 1, dtype=np.float32) if case.alibi else None


@functools.cache
def lse_gradient(case: Case):
    """The gradient of the log-sum-exp, [B, H, T]."""
    rng = np.random.default_rng(len(case.name))
    return rng.standard_normal((case.B, case.H, case.T)).astype(np.float32) * case.lse


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
    """Output, log-sum-exp, and gradients for (q, k, v, bias), in float64 by the formula."""
    (q, k, v, out_grad), bias, mask = inputs(case)
    q, k, v, out_grad = (np.asarray(x, np.float64) for x in (q, k, v, out_grad))
    factors = np.ones((case.B, case.H, case.T, case.S))
    if case.dropout:
        factors = np.asarray(keep(KEY, case.dropout, factors.shape)) / (1 - case.dropout)
    bias_grad = np.zeros((case.bias, case.H, case.T, case.S))
    more = {"slopes_H": slopes(case), "cap": case.soft_cap}
    outs, lses, grads = [], [], []
    for b in range(case.B):
        ids = (None, None)
        if mask.q_segments_BT is not None:
            ids = (np.asarray(mask.q_segments_BT[b]), np.asarray(mask.kv_segments_BS[b]))
        allowed = reference.allowed_pairs(case.T, case.S, *ids, case.causal, case.window)
        added = None if bias is None else np.asarray(bias, np.float64)[b % case.bias]
        call = (q[b], k[b], v[b], allowed)
        out, lse = reference.attention_with_lse(*call, added, factors[b], **more)
        outs.append(out)
        lses.append(lse)
        *qkv, row_bias_grad = reference.attention_gradients(
            *call, out_grad[b], added, factors[b], **more, lse_HT=lse_gradient(case)[b]
        )
        grads.append(qkv)
        if case.bias:
            bias_grad[b % case.bias] += row_bias_grad
    gradients = [np.stack([row[i] for row in grads]) for i in range(3)]
    return np.stack(outs), np.stack(lses), gradients + ([bias_grad] if case.bias else [])


def compute(name: str, case: Case):
    """Output, log-sum-exp and gradients for (q, k, v[, bias]) of the named implementation."""
    (q, k, v, out_grad), bias, mask = inputs(case)
    options = {
        "alibi": None if slopes(case) is None else jnp.asarray(slopes(case)),
        "soft_cap": case.soft_cap,
        "dropout": (case.dropout, KEY) if case.dropout else None,
        "implementation": name,
        "return_lse": True,
    }

    @jax.jit
    def run(gradients, *primals):
        def call(q, k, v, bias=None):
            return attention(q, k, v, mask, bias=bias, **options)

        (out, lse), pull = jax.vjp(call, *primals)
        return out, lse, pull(gradients)

    primals = (q, k, v) if bias is None else (q, k, v, bias)
    return run((jnp.asarray(out_grad), jnp.asarray(lse_gradient(case))), *primals)


def check(name: str, case: Case) -> None:
    """Fails where an implementation is further from float64 than its type allows."""
    out, lse, gradients = compute(name, case)
    wanted_out, wanted_lse, wanted_gradients = truth(case)
    tolerance = TOLERANCE[case.dtype]
    assert out.dtype == jnp.dtype(case.dtype)
    assert lse.dtype == jnp.float32
    assert error(out, wanted_out) <= tolerance
    blind = wanted_lse == -1e30
    np.testing.assert_array_equal(np.asarray(lse)[blind], np.float32(-1e30))
    assert error(np.where(blind, 0, lse), np.where(blind, 0, wanted_lse)) <= tolerance
    # With a single key the gradient of a query is a difference of equal numbers of this size.
    floor = max(abs(wanted).max() for wanted in wanted_gradients) / 3
    names = ("q", "k", "v", "bias")[: len(gradients)]
    for which, got, wanted in zip(names, gradients, wanted_gradients, strict=True):
        assert error(got, wanted, floor) <= 2 * tolerance, which


def small_blocks(monkeypatch, n: int, m: int) -> None:
    """Makes `blockwise` and `pallas_tpu` cut queries by n and keys by m.

    On a TPU blocks of two tiles, and if n < m tiles of two pieces that begin at any half of a tile,
    else blocks of four heads.
    """
    monkeypatch.setattr(lax_blocks, "BLOCK_Q", n)
    monkeypatch.setattr(lax_blocks, "BLOCK_K", m)
    piece_n, heads, unit = (n // 2, 1, m // 2) if n < m else (n, 4, 0)
    sizes = tpu_table.Tiles(n, m, 2 * n, 2 * m, piece_n, m, heads, unit)
    monkeypatch.setattr(tpu_table, "tiles", lambda *_, **__: (sizes, sizes))


def error(got, wanted, floor: float = 1e-30) -> float:
    got = np.asarray(got, np.float64)
    assert got.shape == wanted.shape
    return float(abs(got - wanted).max() / max(abs(wanted).max(), floor))
