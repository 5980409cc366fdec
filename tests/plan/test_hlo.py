"""What a compiled program does, counted by hand and by `hlo`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer.plan import hlo, hlo_text

LOOP = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], bf16[4,8], bf16[6,8,8])) -> (s32[], bf16[4,8], bf16[6,8,8]) {
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[6,8,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %w = bf16[6,8,8]{2,1,0} get-tuple-element(%p), index=2
  %slice = bf16[1,8,8]{2,1,0} dynamic-slice(%w, %i), dynamic_slice_sizes={1,8,8}
  %w1 = bf16[8,8]{1,0} bitcast(%slice)
  %y = bf16[4,8]{1,0} convolution(%x, %w1), dim_labels=bf_io->bf
  %all = bf16[4,8]{1,0} all-reduce(%y), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %next = (s32[], bf16[4,8]{1,0}, bf16[6,8,8]{2,1,0}) tuple(%i, %all, %w)
}

%condition (q: (s32[], bf16[4,8], bf16[6,8,8])) -> pred[] {
  %q = (s32[], bf16[4,8]{1,0}, bf16[6,8,8]{2,1,0}) parameter(0)
  %layers = s32[]{:T(128)} constant(6)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%j, %layers), direction=LT
}

ENTRY %main (start: (s32[], bf16[4,8], bf16[6,8,8])) -> (s32[], bf16[4,8], bf16[6,8,8]) {
  %start = (s32[], bf16[4,8]{1,0}, bf16[6,8,8]{2,1,0}) parameter(0)
  ROOT %w = (s32[], bf16[4,8], bf16[6,8,8]) while(%start), condition=%condition, body=%body
}
"""


def test_a_loop_counts_as_often_as_it_runs():
    counts = hlo.count(LOOP)
    assert counts.flops == 6 * 2 * 4 * 8 * 8
    # The slice is read and written; the product reads both sides and writes. bfloat16.
    assert counts.bytes == 6 * 2 * (2 * 64 + (32 + 64 + 32))
    (one,) = counts.collectives
    assert (one.kind, one.times, one.group) == ("all-reduce", 6, (0, 2, 4, 6))
    assert one.sent == 2 * 64 * 3 / 4


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups=[4,2]<=[8], x", (0, 1)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2), x", (0, 1, 4, 5)),
        ("source_target_pairs={{0,1},{1,0}}, x", (0, 1)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, x", (0, 4)),
    ],
)
def test_groups_of_devices_are_read_in_every_form(text, group):
    assert hlo_text.group_of(text) == group


def test_products_written_as_convolutions_count_the_pairs_that_meet():
    # A batched product [6, 16] of [256, 64] by [64, 256], as the compiler for TPU writes it.
    batched = hlo_text.read(
        "%c = f32[6,16,256,256]{3,2,1,0} convolution(%a, %b), window={size=6x16 stride=5x15 "
        "lhs_dilate=6x16}, dim_labels=01bf_01oi->01bf"
    )
    shapes = [(6, 16, 256, 64), (6, 16, 256, 64)]
    assert hlo._convolution_flops(batched, shapes) == 2 * 6 * 16 * 256 * 256 * 64


def test_arrays_on_the_chip_are_no_memory_traffic():
    assert hlo_text.size("(f32[2,3]{1,0}, bf16[4]{0:T(256)S(1)}, pred[])") == 24 + 1
    assert hlo_text.size("bf16[4]{0:T(256)S(1)}", in_memory=False) == 8
    assert hlo_text.size("(f8e4m3fn[8], s4[2])") == 9


def test_a_send_between_slices_goes_over_the_network():
    send = (
        "  %s = (f32[128]{0}, u32[], token[]) send(%x, %t), channel_id=8, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = (
        f"ENTRY %main (x: f32[128]) -> f32[128] {{\n  %x = f32[128]{{0}} parameter(0)\n{send}\n}}"
    )
    (one,) = hlo.count(text).collectives
    assert (one.kind, one.beyond, one.sent) == ("all-reduce", True, 512.0)


@pytest.mark.parametrize(
    "caller",
    ["fusion(%x), kind=kCustom, calls=%fused", "call-start(%x), to_apply=%fused"],
)
def test_a_collective_inside_a_fusion_or_a_call_counts(caller):
    text = """
%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %f = f32[8]{0} CALLER
}
""".replace("CALLER", caller)
    (one,) = hlo.count(text).collectives
    assert (one.kind, one.sent) == ("all-reduce", 2 * 32 * 3 / 4)


def test_a_program_of_this_machine():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), (AxisType.Explicit,) * 2)

    def layers(x, w):
        def layer(x, w):
            hidden = jnp.einsum("bd,df->bf", x, w, out_sharding=P("data", "tensor"))
            return jnp.einsum("bf,df->bd", hidden, w, out_sharding=P("data", None)), None

        return jax.lax.scan(layer, x, w)[0]

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((64, 32), np.float32, sharding=NamedSharding(mesh, P("data")))
        spread = NamedSharding(mesh, P(None, None, "tensor"))
        w = jax.ShapeDtypeStruct((5, 32, 128), np.float32, sharding=spread)
        counts = hlo.count(jax.jit(functools.partial(layers)).lower(x, w).compile().as_text())
    assert counts.flops == 5 * 2 * 2 * 64 * 32 * 128 / 8
    reduces = [c for c in counts.collectives if c.kind == "all-reduce"]
    assert sum(c.times * c.sent for c in reduces) == 5 * 2 * (32 * 32 * 4) * 3 / 4
    assert {len(c.group) for c in reduces} == {4}


KERNEL = """\
HloModule kernel

ENTRY %main (q: bf16[2,512,256], k: bf16[2,1024,128]) -> bf16[2,512,256] {
  %q = bf16[2,512,256]{2,1,0} parameter(0)
  %k = bf16[2,1024,128]{2,1,0} parameter(1)
  %ids = s32[2,4,1,128]{3,2,1,0} parameter(2)
  ROOT %flash_attention.1 = bf16[2,512,256]{2,1,0} custom-call(%k, %ids, %q, %ids, %k), \
custom_call_target="tpu_custom_call"
}
"""


def test_products_of_our_tpu_kernel_are_counted():
    ((operation, counts, times),) = hlo.operations(KERNEL)
    assert (operation.opcode, times) == ("custom-call", 1)
    assert counts.flops == 2 * 2 * 2 * 512 * 1024 * 256
    backward = KERNEL.replace(
        "tpu_custom_call", 'tpu_custom_call", op_name="flash_attention_backward'
    )
    assert hlo.count(backward).flops == 2.5 * counts.flops


@pytest.mark.parametrize(("part", "products"), [("forward", 2), ("queries", 3), ("keys", 4)])
def test_products_of_our_gpu_kernels_are_counted(part, products):
    text = f"""\
HloModule kernel

ENTRY %main (q: bf16[2,512,4,64], k: bf16[2,1024,2,64]) -> bf16[2,512,4,64] {{
  %q = bf16[2,512,4,64]{{3,2,1,0}} parameter(0)
  %k = bf16[2,1024,2,64]{{3,2,1,0}} parameter(1)
  %lse = f32[2,4,512]{{2,1,0}} parameter(2)
  ROOT %mpmd_map.1 = bf16[2,512,4,64]{{3,2,1,0}} custom-call(%q, %k, %k, %q, %lse, %lse), \
custom_call_target="mosaic_gpu_v2", metadata={{op_name="jit(f)/flash_attention_{part}/mpmd_map"}}
}}
"""
    assert hlo.count(text).flops == products * 2 * 2 * 4 * 512 * 1024 * 64


def test_products_of_the_kernel_of_jax_are_counted():
    text = """\
HloModule kernel

ENTRY %main (q: bf16[2,4,512,64], k: bf16[2,4,1024,64]) -> bf16[2,4,512,64] {
  %q = bf16[2,4,512,64]{3,2,1,0} parameter(0)
  %k = bf16[2,4,1024,64]{3,2,1,0} parameter(1)
  ROOT %flash_attention.1 = bf16[2,4,512,64]{3,2,1,0} custom-call(%q, %k, %k), \
custom_call_target="tpu_custom_call"
}
"""
    assert hlo.count(text).flops == 2 * 2 * 2 * 4 * 512 * 1024 * 64
