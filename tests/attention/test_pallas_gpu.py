"""The GPU kernels in an interpreter that looks for races and for what was never written.

It came with JAX 0.12. It takes products of matrices from NumPy: the layouts in registers are for
`make aot`, where the real compiler checks them.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, check
from jax.experimental.pallas import mosaic_gpu as plgpu

import jaxformer.attention as module
from jaxformer.attention import Mask, attention

pallas_gpu = importlib.import_module("jaxformer.attention.pallas_gpu")
interpreted = pytest.mark.skipif(
    pallas_gpu.INTERPRET is None, reason="this JAX cannot interpret GPU kernels; 0.12 can"
)
ONE = {"B": 1, "H": 1, "G": 1, "dtype": "bfloat16"}
CASES = [
    Case("gpu: causal, three blocks", T=300, S=300, causal=True, **ONE),
    Case("gpu: packed, grouped, dropout", **ONE | {"H": 2}, T=140, S=140, K=64, segments=3,
         causal=True, dropout=0.2, lse=True),
    Case("gpu: heads of 128, window", T=140, S=270, K=128, window=100, **ONE),
    Case("gpu: heads of 40, dropout", T=30, S=150, K=40, segments=2, dropout=0.1, **ONE),
]  # fmt: skip


@interpreted
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_without_races_and_with_nothing_left_unwritten(monkeypatch, case):
    strict = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    monkeypatch.setattr(pallas_gpu, "INTERPRET", strict)
    check("pallas_gpu", case)


@interpreted
def test_what_sees_nothing_gives_zero():
    q_segments, kv_segments = jnp.asarray([[1, 1, 2, 0]]), jnp.asarray([[1, 1, 3, 3]])
    x = jnp.ones((1, 4, 1, 32), jnp.bfloat16)

    def call(q, k, v):
        return attention(q, k, v, Mask(q_segments, kv_segments), implementation="pallas_gpu")

    out, pull = jax.vjp(call, x, x, x)
    gradients = pull(x)
    assert out[0, :, 0, 0].tolist() == [1, 1, 0, 0]
    assert gradients[2][0, :, 0, 0].tolist() == [1, 1, 0, 0]
    for gradient in gradients:
        assert np.isfinite(np.asarray(gradient, np.float32)).all()
        assert (np.asarray(gradient)[0, 2:] == 0).all()


def test_it_is_chosen_on_a_gpu_only_and_for_long_rows(monkeypatch):
    assert "pallas_gpu" not in module._order(2048**2, False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert module._order(2048**2, False) == ("pallas_gpu", "blockwise", "dense", "reference")
    assert module._order(30**2, False) == ("dense", "reference")


@pytest.mark.parametrize(
    ("name", "size", "dtype", "reason"),
    [
        ("NVIDIA A100-SXM4-40GB", 64, jnp.bfloat16, "Hopper .* not NVIDIA A100"),
        ("NVIDIA H100 80GB HBM3", 64, jnp.float32, "no float32: .* bfloat16"),
        ("NVIDIA GH200 480GB", 256, jnp.bfloat16, "no heads of 256: .* registers"),
    ],
)
def test_a_refusal_names_its_reason(monkeypatch, name, size, dtype, reason):
    monkeypatch.setattr(pallas_gpu, "platform", lambda: "gpu")
    monkeypatch.setattr(pallas_gpu, "device_kind", lambda: name)
    x = jax.ShapeDtypeStruct((1, 4, 1, size), dtype)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda x: attention(x, x, x, Mask(), implementation="pallas_gpu"), x)
