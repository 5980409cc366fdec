"""The model against its NumPy float64 twin, and what must not change its output."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer import trees
from jaxformer.attention import Mask
from jaxformer.config import ModelConfig
from jaxformer.model import Transformer, forward, logits
from jaxformer.model.transformer import Stack, rotation

V = 23
ROWS, S, T = 4, 12, 10
PAPER = ModelConfig(
    d_model=16, num_heads=4, d_ff=24, encoder_layers=2, decoder_layers=2, max_length=16
)
MODERN = dataclasses.replace(
    PAPER,
    num_kv_heads=2,
    activation="swiglu",
    norm="rms",
    norm_position="pre",
    positions="rotary",
    bias=False,
    tie_output=False,
)
CONFIGS = {
    "the paper's": PAPER,
    "modern": MODERN,
    "pre-norm, gelu, learned positions, two tables": dataclasses.replace(
        PAPER,
        norm_position="pre",
        activation="gelu",
        positions="learned",
        share_embeddings=False,
        encoder_layers=1,
        decoder_layers=3,
    ),
    "post-norm rms, swiglu with biases, wide heads, all tables apart": dataclasses.replace(
        PAPER,
        norm="rms",
        activation="swiglu",
        num_kv_heads=1,
        head_dim=6,
        share_embeddings=False,
        tie_output=False,
    ),
    "post-norm, rotary, gelu, no biases": dataclasses.replace(
        PAPER, positions="rotary", activation="gelu", bias=False, head_dim=8
    ),
}


def parameters(shapes, seed=0):
    """Random numbers in every place of the tree: biases and scales too, which start at 0 and 1."""
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        x = rng.standard_normal(leaf.shape) * (0.3 if leaf.ndim > 1 else 0.2)
        return jnp.asarray(x + name.endswith("scale_D"), jnp.float32)

    return trees.unflatten(
        shapes, {name: draw(name, x) for name, x in trees.flatten(shapes).items()}
    )


@functools.cache
def build(config) -> Transformer:
    return parameters(jax.eval_shape(lambda: Transformer(config, V, jax.random.key(0))))


@jax.jit
def run(model, batch):
    return logits(model, forward(model, batch))


@jax.jit
def run_with_dropout(model, batch, key):
    return logits(model, forward(model, batch, key))


def pack(rows):
    """Rows of sentence pairs [(source, inputs), ...] as a batch of ROWS rows."""
    names = ["source_BS", "source_segments_BS", "source_positions_BS"]
    batch = {name: np.zeros((ROWS, S), np.int32) for name in names}
    names = ["inputs_BT", "target_segments_BT", "target_positions_BT"]
    batch |= {name: np.zeros((ROWS, T), np.int32) for name in names}
    for r, row in enumerate(rows):
        s = t = 0
        for segment, (source, inputs) in enumerate(row, 1):
            sides = [
                ("source", source, s, "source_BS", "S"),
                ("target", inputs, t, "inputs_BT", "T"),
            ]
            for side, tokens, start, name, letter in sides:
                there = slice(start, start + len(tokens))
                batch[name][r, there] = tokens
                batch[f"{side}_segments_B{letter}"][r, there] = segment
                batch[f"{side}_positions_B{letter}"][r, there] = range(len(tokens))
            s, t = s + len(source), t + len(inputs)
    return batch


def sentences(*lengths, seed=1):
    rng = np.random.default_rng(seed)
    return [(rng.integers(1, V, s), rng.integers(1, V, t)) for s, t in lengths]


# Three sentences in a row with and without room left, one that fills its row, and an empty row.
BATCH_ROWS = [
    sentences((3, 2), (4, 3), (2, 4)),
    sentences((12, 10), seed=2),
    sentences((1, 5), (11, 1), seed=3),
]
BATCH = pack(BATCH_ROWS)
REAL = BATCH["target_segments_BT"] > 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_of_packed_sentences_are_those_of_float64(config):
    model = build(config)
    got = run(model, BATCH)
    assert got.dtype == jnp.float32
    assert got.shape == (ROWS, T, V)
    named = trees.flatten(model)
    for r, row in enumerate(BATCH_ROWS):
        start = 0
        for source, inputs in row:
            wanted = reference.sentence_logits(named, config, source, inputs)
            part = np.asarray(got[r, start : start + len(inputs)])
            assert abs(part - wanted).max() <= 1e-5 * abs(wanted).max()
            start += len(inputs)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=3, max_size=3))
def test_a_sentence_does_not_know_whom_it_shares_a_row_with(lengths):
    pairs = sentences(*lengths)
    got = np.asarray(run(build(MODERN), pack([pairs, *([pair] for pair in pairs)])))
    start = 0
    for r, (_, inputs) in enumerate(pairs, 1):
        n = len(inputs)
        np.testing.assert_allclose(got[0, start : start + n], got[r, :n], atol=2e-6, rtol=0)
        start += n


@pytest.mark.parametrize("config", [PAPER, MODERN], ids=["the paper's", "modern"])
def test_what_stands_in_padding_has_no_say(config):
    rng = np.random.default_rng(5)
    poisoned = {}
    for name, array in BATCH.items():
        side, letter = ("source", "S") if name.endswith("S") else ("target", "T")
        padding = BATCH[f"{side}_segments_B{letter}"] == 0
        other = array if "segments" in name else rng.integers(1, 15, array.shape, np.int32)
        poisoned[name] = np.where(padding, other, array)
    assert (poisoned["source_BS"] != BATCH["source_BS"]).any()
    before, after = run(build(config), BATCH), run(build(config), poisoned)
    np.testing.assert_array_equal(before[REAL], after[REAL])
    assert (before[~REAL] != after[~REAL]).any()


@pytest.mark.parametrize("config", [PAPER, MODERN], ids=["the paper's", "modern"])
def test_a_target_token_is_known_from_its_place_on_and_nowhere_else(config):
    model = build(config)
    before = np.asarray(run(model, BATCH))
    for r, t in [(0, 2), (0, 4), (1, 0), (1, 6), (2, 5)]:
        inputs = BATCH["inputs_BT"].copy()
        inputs[r, t] = inputs[r, t] % (V - 1) + 1
        changed = (np.asarray(run(model, BATCH | {"inputs_BT": inputs})) != before).any(-1)
        segment = BATCH["target_segments_BT"] == BATCH["target_segments_BT"][r, t]
        later = np.arange(T) >= t
        expected = segment & later & (np.arange(ROWS) == r)[:, None]
        np.testing.assert_array_equal(changed & REAL, expected)


def test_a_source_token_is_known_to_its_own_segment():
    model = build(PAPER)
    before = np.asarray(run(model, BATCH))
    source = BATCH["source_BS"].copy()
    source[0, 4] = source[0, 4] % (V - 1) + 1  # in segment 2
    changed = (np.asarray(run(model, BATCH | {"source_BS": source})) != before).any(-1)
    np.testing.assert_array_equal(changed[0], BATCH["target_segments_BT"][0] == 2)
    assert not changed[1:].any()


def test_no_gradient_flows_between_segments():
    """With tokens of its own for every segment, rows of the tables tell where gradients went."""
    config = CONFIGS["post-norm rms, swiglu with biases, wide heads, all tables apart"]
    ids = {1: np.arange(1, 5), 2: np.arange(5, 9), 3: np.arange(9, 13)}
    row = [(ids[i][:3], ids[i][:3]) for i in ids]
    batch = pack([row])

    @jax.jit
    def gradient(model, wanted):
        of_segment = (batch["target_segments_BT"] == wanted)[..., None]
        return jax.grad(
            lambda m: jnp.where(of_segment, jnp.sin(logits(m, forward(m, batch))), 0.0).sum()
        )(model)

    for segment, tokens in ids.items():
        grads = trees.flatten(gradient(build(config), segment))
        for name in ("embedding_VD", "target_embedding_VD"):
            reached = (np.asarray(grads[name]) != 0).any(-1)
            np.testing.assert_array_equal(np.flatnonzero(reached), tokens[:3], name)


def test_dropout_needs_a_key_and_is_a_function_of_it():
    config = dataclasses.replace(PAPER, dropout=0.2, attention_dropout=0.2)
    model = build(config)
    plain = np.asarray(run(model, BATCH))
    np.testing.assert_array_equal(plain, run(build(PAPER), BATCH))
    one, again, two = (
        np.asarray(run_with_dropout(model, BATCH, jax.random.key(seed))) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    for a, b in [(plain, one), (one, two)]:
        assert (abs(a - b)[REAL].max(-1) > 1e-3).all()


def test_every_layer_and_sub_layer_drops_other_elements():
    """Sub-layers that give constants 1, 10, 100 leave a sum in which every mask can be read."""
    rate, layers, width = 0.5, 3, 64
    config = dataclasses.replace(
        PAPER, d_model=width, norm_position="pre", norm="rms", dropout=rate, decoder_layers=layers
    )
    shapes = jax.eval_shape(lambda: Stack(config, layers, True, jax.random.key(0)))
    constants = {
        "blocks/self_attention/output_bias_D": 1.0,
        "blocks/cross_attention/output_bias_D": 10.0,
        "blocks/feed_forward/down_bias_D": 100.0,
    }
    named = {
        name: jnp.full(leaf.shape, constants.get(name, 1.0 if "scale" in name else 0.0))
        for name, leaf in trees.flatten(shapes).items()
    }
    assert constants.keys() <= named.keys()
    x = jnp.zeros((2, 8, width))

    @jax.jit
    def sums(stack, key):
        # The last norm divides by the size of x, which one huge feature makes the same everywhere.
        return stack(x.at[..., 0].set(1e7), Mask(), memory=(x, Mask()), key=key)

    out = np.asarray(sums(trees.unflatten(shapes, named), jax.random.key(0)))[..., 1:]
    units = out * (1e7 / width**0.5) * (1 - rate)
    np.testing.assert_allclose(units, np.rint(units), rtol=0, atol=0.05)
    units = np.rint(units).astype(int)
    # Were a mask shared by all layers, every digit would be 0 or `layers`.
    digits = [units % 10, units // 10 % 10, units // 100]
    for digit in digits:
        assert set(np.unique(digit)) == {0, 1, 2, 3}
        np.testing.assert_allclose(digit.mean(), layers / 2, atol=0.15)
    for a, b in [(0, 1), (1, 2), (0, 2)]:
        correlation = np.corrcoef(digits[a].ravel(), digits[b].ravel())[0, 1]
        assert abs(correlation) < 5 / digits[a].size ** 0.5


def test_recomputing_layers_changes_no_gradient():
    config = dataclasses.replace(PAPER, dropout=0.2, attention_dropout=0.2)
    x = np.random.default_rng(4).standard_normal((2, 6, 16)).astype(np.float32)

    def gradient(remat):
        made = dataclasses.replace(config, remat=remat)
        stack = parameters(jax.eval_shape(lambda: Stack(made, 2, False, jax.random.key(0))))

        def value(stack, key):
            return jnp.sin(stack(x, Mask(), key=key)).sum()

        assert ("remat" in str(jax.make_jaxpr(value)(stack, jax.random.key(4)))) == remat
        return trees.flatten(jax.jit(jax.grad(value))(stack, jax.random.key(4)))

    plain, again = gradient(False), gradient(True)
    for name, wanted in plain.items():
        if "key_bias" in name:  # it moves all scores of a query alike: no gradient but noise
            continue
        size = abs(np.asarray(wanted)).max()
        np.testing.assert_allclose(again[name], wanted, rtol=0, atol=1e-6 * size, err_msg=name)


@pytest.mark.parametrize("config", [PAPER, MODERN], ids=["the paper's", "modern"])
def test_bfloat16_is_near_float32(config):
    model = build(dataclasses.replace(config, dtype="bfloat16"))
    memory = jax.eval_shape(forward, model, BATCH)
    assert memory.dtype == jnp.bfloat16
    got, wanted = run(model, BATCH), run(build(config), BATCH)
    assert got.dtype == jnp.float32
    error = abs(np.asarray(got) - np.asarray(wanted))[REAL].max()
    assert 0 < error < 0.05 * abs(np.asarray(wanted)).max()


@pytest.mark.parametrize("causal", [False, True], ids=["encoder only", "decoder only"])
def test_a_stack_alone_is_an_encoder_or_a_language_model(causal):
    config = dataclasses.replace(MODERN, activation="gelu")
    stack = parameters(jax.eval_shape(lambda: Stack(config, 2, False, jax.random.key(0))), seed=3)
    x = np.random.default_rng(4).standard_normal((2, 6, 16)).astype(np.float32)
    positions = np.tile(np.arange(6, dtype=np.int32), (2, 1))

    @jax.jit
    def call(stack, x):
        return stack(x, Mask(causal=causal), rotation(config, positions))

    got = np.asarray(call(stack, x))
    named = {name: np.asarray(value, np.float64) for name, value in trees.flatten(stack).items()}
    allowed = reference.allowed_pairs(6, 6, causal=causal)
    for b in range(2):
        wanted = reference.stack(named, config, x[b].astype(np.float64), allowed, positions[b])
        assert abs(got[b] - wanted).max() <= 1e-5 * abs(wanted).max()
