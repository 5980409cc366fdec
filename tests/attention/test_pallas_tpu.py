"""The TPU kernels in an interpreter that looks for races and for what was never written."""

import importlib

import jax
import jax.numpy as jnp
import pytest
from attention_cases import CASES, check
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

import jaxformer.attention as module
from jaxformer.attention import Mask, attention, tpu_table

pallas_tpu = importlib.import_module("jaxformer.attention.pallas_tpu")
NAMES = ("packed, causal, odd", "cross, long queries", "dropout, packed, causal", "everything")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMES], ids=lambda c: c.name)
def test_no_race_and_nothing_left_unwritten(monkeypatch, case):
    strict = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    monkeypatch.setattr(pallas_tpu, "INTERPRET", strict)
    small = tpu_table.Tiles(n=32, m=32, q_block=64, k_block=64, piece_n=16, piece_m=16)
    monkeypatch.setattr(tpu_table, "tiles", lambda *_, **__: (small, small))
    check("pallas_tpu", case)
    assert not interpret_pallas_call.races.races_found


def test_it_is_chosen_on_a_tpu_only_and_for_long_rows(monkeypatch):
    assert module._order(2048, 2048) == ("blockwise", "dense", "reference")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert module._order(2048, 2048)[0] == "pallas_tpu"
    assert module._order(30, 30) == ("dense", "reference")


def test_a_row_of_zeros_comes_from_segments_without_keys():
    x = jnp.ones((1, 4, 1, 8))
    mask = Mask(jnp.asarray([[1, 1, 2, 0]]), jnp.asarray([[1, 1, 1, 1]]))
    out = attention(x, x, x, mask, implementation="pallas_tpu")
    assert out[0, :, 0, 0].tolist() == [1.0, 1.0, 0.0, 0.0]
