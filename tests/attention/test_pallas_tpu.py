"""The TPU kernels: in an interpreter that looks for races and for what was never written, and what
they leave out of packed rows.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, check
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

import jaxformer.attention as module
from jaxformer.attention import Mask, attention, tpu_table

pallas_tpu = importlib.import_module("jaxformer.attention.pallas_tpu")
tpu_backward = importlib.import_module("jaxformer.attention.tpu_backward")

# Several blocks of queries and of keys, of two tiles of one piece.
RACES = [
    (Case("races: packed, causal, dropout, log-sum-exp", B=1, T=45, S=45, segments=3, causal=True,
          dropout=0.2, lse=True), (16, 16, 32, 32, 16, 16, 2, 8)),
    (Case("races: cross, grouped, bias", B=1, H=2, G=1, T=45, S=30, bias=1),
     (16, 16, 32, 16, 16, 16)),
]  # fmt: skip


@pytest.mark.parametrize(("case", "sizes"), RACES, ids=lambda x: getattr(x, "name", ""))
def test_no_race_and_nothing_left_unwritten(monkeypatch, case, sizes):
    strict = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    monkeypatch.setattr(pallas_tpu, "INTERPRET", strict)
    small = tpu_table.Tiles(*sizes)
    monkeypatch.setattr(tpu_table, "tiles", lambda *_, **__: (small, small))
    check("pallas_tpu", case)
    assert not interpret_pallas_call.races.races_found


def computed(monkeypatch, segments_BT, causal) -> list[np.ndarray]:
    """How often the kernels, forward and backward, compute each pair of places, [T, T]."""
    looks = []
    for which, kernel in enumerate((pallas_tpu, tpu_backward)):

        def look(tile, *rest, which=which, given=kernel._look):
            n, m, unit = rest[-1].n, rest[-1].m, rest[-1].unit

            def note(i, j):
                looks.append((which, i * n, j * unit, n, m))

            jax.debug.callback(note, tile.i, tile.j)
            given(tile, *rest)

        monkeypatch.setattr(kernel, "_look", look)
    T = segments_BT.shape[1]
    x, mask = jnp.ones((1, T, 1, 128)), Mask(segments_BT, segments_BT, causal=causal)

    @jax.jit
    def both(x):
        out, pull = jax.vjp(lambda x: attention(x, x, x, mask, implementation="pallas_tpu"), x)
        return out, pull(out)

    jax.block_until_ready(both(x))
    jax.effects_barrier()
    pictures = [np.zeros((T, T), int) for _ in range(2)]
    for which, i, j, n, m in looks:
        pictures[which][i : i + n, j : j + m] += 1
    return pictures


@pytest.mark.parametrize("causal", [True, False])
def test_of_packed_rows_at_least_85_percent_is_left_out(monkeypatch, causal):
    """A row of 2,048 tokens, sentences of about 30, tiles as on a TPU."""
    lengths = np.random.default_rng(0).poisson(30, 100)
    ids = np.repeat(np.arange(1, 101, dtype=np.int32), lengths)[None, :2048]
    wanted = ids[0][:, None] == ids
    if causal:
        wanted &= np.tri(2048, dtype=bool)
    for picture in computed(monkeypatch, jnp.asarray(ids), causal):
        assert picture.max() == 1  # nothing twice
        assert picture[wanted].all()
        assert picture.mean() <= 0.15


def test_it_is_chosen_on_a_tpu_only_and_for_long_rows(monkeypatch):
    assert module._order(2048**2, False) == ("blockwise", "dense", "reference")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for shortest, packed in ((256, False), (128, True)):
        assert module._order(shortest**2, packed)[0] == "pallas_tpu"
        assert module._order(shortest**2 - 1, packed) == ("dense", "reference")


@pytest.mark.parametrize(
    ("K", "dtype", "longest"), [(128, "bfloat16", 40960), (64, "float32", 16384)]
)
def test_rows_that_do_not_fit_in_vmem_are_refused_with_the_reason(K, dtype, longest):
    def shape(length):
        x = jax.ShapeDtypeStruct((1, length, 2, K), dtype)
        return jax.eval_shape(
            functools.partial(attention, mask=Mask(), implementation="pallas_tpu"), x, x, x
        ).shape

    assert shape(longest) == (1, longest, 2, K)
    with pytest.raises(NotImplementedError, match="keeps the queries of a head in VMEM"):
        shape(longest + 4096)


def test_a_row_of_zeros_comes_from_segments_without_keys():
    x = jnp.ones((1, 4, 1, 8))
    mask = Mask(jnp.asarray([[1, 1, 2, 0]]), jnp.asarray([[1, 1, 1, 1]]))
    out = attention(x, x, x, mask, implementation="pallas_tpu")
    assert out[0, :, 0, 0].tolist() == [1.0, 1.0, 0.0, 0.0]
