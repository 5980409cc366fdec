"""The attention kernels, compiled for TPUs and for an H100 that are not here: `make aot`."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks import ahead
from jaxformer.attention import Mask, attention
from jaxformer.errors import UserError
from jaxformer.hardware import CHIPS
from jaxformer.plan import target

LIMIT = 600
"""Seconds that the compiler may take; it needs 20 on a quiet machine."""
ALL = ("alibi", "dropout", "segments", "soft_cap")


def compiled(chip: str, **options) -> ahead.Result:
    """Forward and backward of our kernel; skips where the compiler is not installed."""
    try:
        target.parse("h100:1x1" if chip == "h100" else CHIPS[chip].topology)
    except UserError as missing:
        pytest.skip(str(missing))
    result = ahead.measure(ahead.Case(chip, "ours", backward=True, profile=False, **options), LIMIT)
    assert not result.refused
    return result


def check_tpu(result: ahead.Result) -> None:
    names = " ".join(name for name, *_ in result.operations)
    assert len(re.findall("flash_attention", names)) == 2, names
    assert result.pictures == []


@pytest.mark.parametrize(
    "chip",
    ["v5e", *(pytest.param(chip, marks=pytest.mark.long) for chip in ("v5p", "v6e", "tpu7x"))],
)
def test_forward_and_backward_compile_for_tpus_without_a_picture(chip):
    check_tpu(compiled(chip))


def test_all_options_at_once_compile_for_a_tpu():
    check_tpu(compiled("v5e", G=2, options=ALL, window=300))


@pytest.mark.long
@pytest.mark.parametrize(
    ("chip", "S", "D"),
    [("v5p", 2048, 128), ("v6e", 2048, 128), ("tpu7x", 2048, 128), ("tpu7x", 4096, 256)],
)
def test_packed_rows_compile_for_other_tpus(chip, S, D):
    """Eight heads of 128 to a block, or fewer wide ones: as much as goes into VMEM."""
    check_tpu(compiled(chip, S=S, D=D, H=8, G=8, options=("segments", "dropout")))


@pytest.mark.long
@pytest.mark.parametrize("D", [64, 96])
def test_other_head_sizes_and_odd_lengths_compile(D):
    check_tpu(compiled("v6e", S=2047, D=D, causal=False))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ("dropout", {}),
        pytest.param("", {}, marks=pytest.mark.long),
        pytest.param("", {"D": 64}, marks=pytest.mark.long),
        pytest.param("segments", {"G": 2}, marks=pytest.mark.long),
        pytest.param("dropout segments", {"causal": False}, marks=pytest.mark.long),
        pytest.param("dropout segments", {"G": 2, "window": 300}, marks=pytest.mark.long),
    ],
)
def test_h100_kernels_spill_nothing_and_use_wgmma_and_tma(options, shape):
    result = compiled("h100", options=tuple(options.split()), **shape)
    assert result.pictures == []
    assert [re.sub(r"_\d+$", "", k["name"]) for k in result.kernels] == [
        "flash_attention_forward",
        "flash_attention_keys",
        "flash_attention_queries",
    ]
    for kernel in result.kernels:
        assert (kernel["registers"], kernel["spills"]) == (168, 0), kernel["name"]
        assert not kernel["serialized"], kernel["name"]
        assert not {"LDL", "STL"} & set(kernel["instructions"])
        assert {"HGMMA", "UTMALDG"} <= set(kernel["instructions"])


def test_a_failure_of_the_compiler_is_told():
    result = ahead.measure(ahead.Case("v5e", "ours", S=128), 0.01)
    assert "more than 0 s" in result.refused


@pytest.mark.parametrize(("implementation", "seen"), [("blockwise", False), ("dense", True)])
def test_pictures_are_seen_in_a_program(implementation, seen):
    x = jax.ShapeDtypeStruct((1, 1024, 2, 32), jnp.float32)

    def gradients(q, k, v, out_grad):
        def run(q, k, v):
            return attention(q, k, v, Mask(causal=True), implementation=implementation)

        return jax.vjp(run, q, k, v)[1](out_grad)

    text = jax.jit(gradients).lower(x, x, x, x).compile().as_text()
    assert bool(ahead.pictures(text, 1024 * 1024)) == seen
