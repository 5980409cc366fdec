"""Every implementation of attention against float64, in one suite.

An implementation may refuse a feature with NotImplementedError, if `REFUSALS` says so. A refusal
that is not listed fails, and so does a listed one that no longer happens.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from attention_cases import CASES, REFUSALS, check, compute, error, inputs

import jaxformer.attention as module
from jaxformer.attention import IMPLEMENTATIONS, Mask, attention


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_output_and_gradients_are_those_of_float64(name, case):
    if REFUSALS[name] & case.features:
        with pytest.raises(NotImplementedError, match=name):
            compute(name, case)
        return
    check(name, case)


def test_the_float64_gradients_are_slopes_of_the_float64_output():
    case = next(case for case in CASES if case.name == "bias of each row")
    (q, k, v, out_grad), bias, mask = inputs(case)
    rng = np.random.default_rng(0)
    ids = (np.asarray(mask.q_segments_BT[1]), np.asarray(mask.kv_segments_BS[1]))
    allowed = reference.allowed_pairs(case.T, case.S, *ids)
    factor = rng.uniform(0, 2, (case.H, case.T, case.S))
    at = [np.asarray(x[1], np.float64) for x in (q, k, v, bias)]
    pull, lse_pull = np.asarray(out_grad[1], np.float64), rng.standard_normal((case.H, case.T))
    more = {"slopes_H": np.array([0.5, 0.1]), "cap": 1.5}
    gradients = reference.attention_gradients(
        *at[:3], allowed, pull, at[3], factor, **more, lse_HT=lse_pull
    )
    for i, gradient in enumerate(gradients):
        direction = rng.standard_normal(at[i].shape)

        def value(step, i=i, direction=direction):
            moved = [x + step * direction if i == j else x for j, x in enumerate(at)]
            out, lse = reference.attention_with_lse(*moved[:3], allowed, moved[3], factor, **more)
            seen = lse > -1e30
            return (pull * out).sum() + (lse_pull * lse)[seen].sum()

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


def refuses(*_):
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
