"""What blocks must not change, what they must save, and when they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, Case, check, small_blocks

import jaxformer.attention as module
from jaxformer.attention import Mask, attention, lax_blocks
from jaxformer.attention.extras import Extras

# Each feature once in several blocks; in one block all cases are in test_attention.py.
NAMES = (
    "one query",
    "causal",
    "cross, long queries",
    "bias, grouped, packed",
    "alibi, grouped, packed",
    "soft cap, cross, packed",
    "log-sum-exp, causal",
    "window",
    "window, causal",
    "everything",
    "bfloat16",
)
SIZES = [(16, 24), (40, 8)]


def runs():
    """(implementation, case, block): the sizes in turn, and both for two of the cases."""
    cases = {case.name: case for case in CASES}
    for name in ("blockwise", "pallas_tpu"):
        for x, case in enumerate(NAMES):
            both = case in ("causal", "everything")
            yield from ((name, cases[case], size) for size in (SIZES if both else [SIZES[x % 2]]))


@pytest.mark.parametrize(
    ("name", "case", "blocks"), [*runs()], ids=lambda x: x.name if isinstance(x, Case) else str(x)
)
def test_the_size_of_blocks_decides_nothing(monkeypatch, name, case, blocks):
    small_blocks(monkeypatch, *blocks)
    check(name, case)


def temporaries(name: str, length: int) -> int:
    """Bytes of the compiled forward and backward pass beside arguments and results."""
    x = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)

    def loss(q, k, v):
        return attention(q, k, v, Mask(causal=True), implementation=name).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_memory_is_linear_in_the_length():
    once, twice, four_times = (temporaries("blockwise", n) for n in (2048, 4096, 8192))
    assert twice <= 2.1 * once
    assert four_times <= 4.2 * once
    assert temporaries("dense", 4096) > 5 * twice


def packed(length: int, sentence: int) -> jax.Array:
    return (jnp.arange(length) // sentence + 1).astype(jnp.int32)[None]


def blocks_computed(segments_BT, causal=True, window=None) -> int:
    x = jnp.zeros((1, segments_BT.shape[1], 1, 8))
    mask = Mask(segments_BT, segments_BT, causal=causal, window=window)
    row = jax.tree.map(lambda leaf: leaf[0], lax_blocks.cut(x, x, x, mask))
    first, end = lax_blocks.spans(row, mask, Extras())
    return int((end - first).clip(0).sum())


def test_blocks_that_the_mask_rules_out_are_not_computed(monkeypatch):
    monkeypatch.setattr(lax_blocks, "BLOCK_Q", 128)
    monkeypatch.setattr(lax_blocks, "BLOCK_K", 128)
    one = packed(2048, 2048)
    assert blocks_computed(one, causal=False) == 16 * 16
    assert blocks_computed(one) == 16 * 17 / 2
    assert blocks_computed(one, window=128) == 16 + 15
    # Sentences of 30 tokens: those that cross a border need the block beside the diagonal.
    assert blocks_computed(packed(2048, 30)) == 16 + 14  # 1,920 is a border of both
    assert blocks_computed(packed(2048, 32)) == 16
    assert blocks_computed(packed(2048, 30), causal=False) == 16 + 2 * 14
    assert blocks_computed(jnp.zeros((1, 2048), jnp.int32)) == 0


@pytest.mark.parametrize(("length", "wanted"), [(511, "dense"), (512, "blockwise")])
def test_long_rows_are_computed_in_blocks_and_short_ones_at_once(monkeypatch, length, wanted):
    called = []

    def spy(name):
        def call(q, *_):
            called.append(name)
            return q, q

        return call

    names = {name: spy(name) for name in module.IMPLEMENTATIONS}
    monkeypatch.setattr(module, "IMPLEMENTATIONS", names)
    x = jnp.zeros((1, length, 1, 8))
    attention(x, x, x, Mask())
    assert called == [wanted]


def test_dropout_bits_are_those_of_the_whole_picture(monkeypatch):
    monkeypatch.setattr(lax_blocks, "BLOCK_Q", 8)
    monkeypatch.setattr(lax_blocks, "BLOCK_K", 16)
    q, k = (jnp.zeros((2, n, 3, 40)) for n in (20, 40))
    v = jnp.broadcast_to(jnp.eye(40)[None, :, None], (2, 40, 3, 40))  # the output is the weights
    options = {"dropout": (0.3, jax.random.key(1))}
    got, wanted = (
        attention(q, k, v, Mask(), implementation=name, **options)
        for name in ("blockwise", "reference")
    )
    np.testing.assert_array_equal(np.asarray(got) == 0, np.asarray(wanted) == 0)
    assert 0.2 < (np.asarray(got) == 0).mean() < 0.4
