"""`recorded` hands out what the model computed; unasked, the model computes nothing more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jaxformer import trees
from jaxformer.config import ModelConfig
from jaxformer.model import Transformer, forward, lens, logits, recorded

V, S, T = 23, 7, 6
SOURCE, INPUTS = [5, 9, 4, 11, 3], [2, 7, 8, 20]
CONFIGS = {
    "paper": ModelConfig(d_model=16, num_heads=4, d_ff=24, encoder_layers=2, decoder_layers=3),
    "modern": ModelConfig(
        d_model=16,
        num_heads=4,
        num_kv_heads=2,
        d_ff=24,
        encoder_layers=2,
        decoder_layers=3,
        norm="rms",
        norm_position="pre",
        positions="rotary",
        activation="swiglu",
        bias=False,
    ),
}


def build(config):
    model = Transformer(config, V, jax.random.key(3))
    return jax.tree.map(lambda leaf: leaf * 2.0 if leaf.ndim > 2 else leaf, model)


def row(tokens, length):
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(tokens)] = tokens
    return padded, (padded != 0).astype(np.int32), np.arange(length, dtype=np.int32)[None]


def batch():
    source, source_segments, source_positions = row(SOURCE, S)
    inputs, target_segments, target_positions = row(INPUTS, T)
    return {
        "source_BS": source,
        "source_segments_BS": source_segments,
        "source_positions_BS": source_positions,
        "inputs_BT": inputs,
        "target_segments_BT": target_segments,
        "target_positions_BT": target_positions,
    }


@pytest.fixture(params=CONFIGS, scope="module")
def case(request):
    model = build(CONFIGS[request.param])
    x_BTD, record = recorded(model, batch())
    return model, np.asarray(x_BTD), jax.tree.map(np.asarray, record)


def test_the_output_is_that_of_the_model(case):
    model, x_BTD, _ = case
    expected = jax.jit(forward)(model, batch())
    np.testing.assert_allclose(x_BTD[:, : len(INPUTS)], expected[:, : len(INPUTS)], atol=2e-6)


def test_layer_by_layer_it_agrees_with_the_reference_in_float64(case):
    """Queries, keys, values, scores, weights, heads and streams of every layer."""
    model, _, record = case
    config = model.config
    names = {name: np.float64(x) for name, x in trees.flatten(model).items()}
    tokens = {"encoder": SOURCE, "decoder": INPUTS}
    memory = None
    for side in ("encoder", "decoder"):
        n = len(tokens[side])
        places = np.arange(n)
        x = reference.embed(names["embedding_VD"], None, config, tokens[side], places)
        close(record[side]["input_BTD"][0, :n], x)
        blocks = reference.part(names, f"{side}/blocks")
        for layer in range(len(next(iter(blocks.values())))):
            p = {name: value[layer] for name, value in blocks.items()}
            own = reference.allowed_pairs(n, n, causal=side == "decoder")
            x = check(record, p, config, side, "self_attention", layer, x, None, own, places)
            if side == "decoder":
                every = np.ones((n, len(SOURCE)), bool)
                x = check(record, p, config, side, "cross_attention", layer, x, memory, every, None)
            x = check(record, p, config, side, "feed_forward", layer, x, None, None, None)
        if config.norm_position == "pre":
            x = reference.norm(reference.part(names, f"{side}/norm"), x)
        memory = x


def check(record, p, config, side, name, layer, x, memory, allowed, places):
    """One sub-layer, recomputed; returns the stream after it."""
    seen = {key: value[layer] for key, value in record[side][name].items()}
    part, norm = reference.part(p, name), reference.part(p, f"{name}_norm")
    y = reference.norm(norm, x) if config.norm_position == "pre" else x
    if name == "feed_forward":
        added = reference.feed_forward(part, config, y)
    else:
        there = y if memory is None else memory
        q = reference.heads(part, "query", "H", y)
        k = reference.heads(part, "key", "G", there)
        v = reference.heads(part, "value", "G", there)
        if config.positions == "rotary" and places is not None:
            for array in (q, k):
                for t, h in np.ndindex(*array.shape[:2]):
                    array[t, h] = reference.rotated(array[t, h], t)
        n, m, H = len(q), len(k), q.shape[1]
        close(seen["q_BTHK"][0, :n], q)
        close(seen["k_BSGK"][0, :m], k)
        close(seen["v_BSGK"][0, :m], v)
        for h in range(H):
            g = h // (H // k.shape[1])
            scores = q[:, h] @ k[:, g].T / np.sqrt(q.shape[2])
            close(seen["scores_BHTS"][0, h, :n, :m], scores)
            for t in range(n):
                weights = np.zeros(m)
                weights[allowed[t]] = reference.softmax(scores[t, allowed[t]])
                close(seen["weights_BHTS"][0, h, t, :m], weights)
        np.testing.assert_array_equal(seen["allowed_BTS"][0, :n, :m], allowed)
        assert not seen["weights_BHTS"][0, :, :, m:].any()  # PAD
        close(seen["heads_BTHK"][0, :n], reference.attention(q, k, v, allowed))
        added = reference.multi_head(part, config, y, there, allowed, places)
    close(seen["added_BTD"][0, : len(x)], added)
    x = x + added
    if config.norm_position == "post":
        x = reference.norm(norm, x)
    close(seen["stream_BTD"][0, : len(x)], x)
    return x


def close(actual, expected):
    """Within float32's rounding of the sums behind the largest number."""
    size = max(1.0, abs(np.asarray(expected)).max())
    np.testing.assert_allclose(actual, expected, atol=1e-5 * size, rtol=0)


def test_the_lens_of_the_last_layer_is_the_output(case):
    model, x_BTD, record = case
    found = lens(model, jnp.asarray(record["decoder"]["feed_forward"]["stream_BTD"]))
    assert found.shape == (3, 1, T, V)
    np.testing.assert_allclose(found[-1], logits(model, jnp.asarray(x_BTD)), atol=1e-5)


def test_without_the_causal_mask_the_future_is_seen(case):
    model, _, _ = case
    _, record = recorded(model, batch(), causal=False)
    weights = record["decoder"]["self_attention"]["weights_BHTS"]
    assert (np.asarray(weights)[:, 0, :, 0, 1 : len(INPUTS)] > 0).all()


def test_unasked_nothing_leaves_the_loop_over_layers(case):
    """The scan has no output but the stream, and a softmax is computed once for each attention."""
    model, _, _ = case

    def scans(jaxpr):
        return [e for e in jaxpr.eqns if e.primitive.name == "scan"]

    plain = jax.make_jaxpr(forward)(model, batch())
    assert [len(e.outvars) for e in scans(plain.jaxpr)] == [1, 1]
    assert [str(e).count(" exp ") for e in scans(plain.jaxpr)] == [1, 2]
    asked = jax.make_jaxpr(lambda m, b: recorded(m, b))(model, batch())
    assert str(asked).count(" exp ") > str(plain).count(" exp ")
