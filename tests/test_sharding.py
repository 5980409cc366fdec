"""The same numbers on every mesh of the eight virtual devices."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer import trees
from jaxformer.config import Config, MeshConfig, ModelConfig
from jaxformer.errors import UserError
from jaxformer.model import Transformer, forward
from jaxformer.model.loss import cross_entropy
from jaxformer.sharding import check_mesh, make_mesh, mesh_shape, place

V, ROWS, LENGTH = 64, 8, 16
AXES = ("data", "fsdp", "tensor", "context")
PAPER = ModelConfig(
    d_model=32, num_heads=8, d_ff=64, encoder_layers=2, decoder_layers=2, dropout=0.0
)
MODERN = dataclasses.replace(
    PAPER,
    num_kv_heads=4,
    activation="swiglu",
    norm="rms",
    norm_position="pre",
    positions="rotary",
    share_embeddings=False,
    tie_output=False,
)
MESHES = [
    ((1, 1, 8, 1), PAPER),
    ((1, 1, 1, 8), PAPER),
    ((2, 1, 1, 4), MODERN),
    ((4, 1, 2, 1), MODERN),
]
"""Those that `training/test_meshes.py` does not train on."""


def batch():
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 4, (ROWS, LENGTH)), axis=1)[:, ::-1].astype(np.int32)
    positions = np.arange(LENGTH, dtype=np.int32) - np.argmax(
        segments[:, :, None] == segments[:, None, :], axis=-1
    ).astype(np.int32)
    tokens = {
        name: rng.integers(1, V, (ROWS, LENGTH), np.int32)
        for name in ("source_BS", "inputs_BT", "targets_BT")
    }
    return tokens | {
        "source_segments_BS": segments,
        "source_positions_BS": positions,
        "target_segments_BT": segments,
        "target_positions_BT": positions,
    }


BATCH = batch()


def loss(model, rows):
    x_BTD = forward(model, rows)
    weights_BT = rows["target_segments_BT"] > 0
    return cross_entropy(model, x_BTD, rows["targets_BT"], weights_BT, 0.1)["loss"]


def loss_and_gradients(model, rows):
    value, gradients = jax.value_and_grad(loss)(model, rows)
    return value, trees.flatten(gradients)


def initial(config):
    return Transformer(config, V, jax.random.key(0))


@functools.cache
def on_one_device(config):
    """Parameters, and (loss, gradients), without any mesh."""
    model = jax.jit(initial, static_argnums=0)(config)
    return model, jax.jit(loss_and_gradients)(model, BATCH)


def agree(got, wanted):
    (loss, gradients), (wanted_loss, wanted_gradients) = got, wanted
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        size = abs(np.asarray(wanted_gradients[name])).max()
        error = abs(np.asarray(gradient) - np.asarray(wanted_gradients[name])).max()
        # No key bias has a gradient: it moves all scores of a query alike. What is left is noise.
        assert error <= 1e-5 * (1.0 if "key_bias" in name else size), name


def spread_over(mesh, model):
    shapes = jax.eval_shape(functools.partial(initial, model.config))
    return jax.device_put(
        model, jax.tree.map(lambda leaf: NamedSharding(mesh, leaf.sharding.spec), shapes)
    )


def check_on(mesh, config):
    model, wanted = on_one_device(config)
    with jax.set_mesh(mesh):
        spread = spread_over(mesh, model)
        got = jax.jit(loss_and_gradients)(spread, place(BATCH, mesh))
    agree(got, wanted)
    for name, leaf in trees.flatten(spread).items():
        assert got[1][name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name


@pytest.mark.parametrize(("sizes", "config"), MESHES, ids=[str(sizes) for sizes, _ in MESHES])
def test_loss_and_gradients_are_those_of_one_device(sizes, config):
    check_on(make_mesh(MeshConfig(*sizes)), config)


def test_a_mesh_of_one_device_changes_nothing():
    alone = jax.devices()[:1]
    check_on(jax.make_mesh((1,) * 4, AXES, (AxisType.Explicit,) * 4, devices=alone), PAPER)


def test_parameters_are_born_in_shards_and_with_the_values_of_one_device():
    mesh = make_mesh(MeshConfig(2, 2, 2, 1))
    with jax.set_mesh(mesh):
        born = trees.flatten(jax.jit(initial, static_argnums=0)(MODERN))
    expected = {
        "embedding_VD": P("tensor", "fsdp"),
        "target_embedding_VD": P("tensor", "fsdp"),
        "output_VD": P("tensor", "fsdp"),
        "encoder/blocks/self_attention/query_DHK": P(None, "fsdp", "tensor", None),
        "encoder/blocks/self_attention/value_DGK": P(None, "fsdp", "tensor", None),
        "encoder/blocks/self_attention/query_bias_HK": P(None, "tensor", None),
        "decoder/blocks/cross_attention/output_HKD": P(None, "tensor", None, "fsdp"),
        "decoder/blocks/cross_attention/output_bias_D": P(None, None),
        "decoder/blocks/feed_forward/up_DF": P(None, "fsdp", "tensor"),
        "decoder/blocks/feed_forward/gate_DF": P(None, "fsdp", "tensor"),
        "decoder/blocks/feed_forward/down_FD": P(None, "tensor", "fsdp"),
        "decoder/blocks/feed_forward/up_bias_F": P(None, "tensor"),
        "decoder/blocks/feed_forward_norm/scale_D": P(None, None),
        "decoder/norm/scale_D": P(None),
    }
    for name, layout in expected.items():
        array = born[name]
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, layout), array.ndim), name
        ways = math.prod(2 for axis in layout if axis)
        assert {s.data.nbytes for s in array.addressable_shards} == {array.nbytes // ways}, name
    alone = trees.flatten(on_one_device(MODERN)[0])
    for name, array in born.items():
        np.testing.assert_array_equal(array, alone[name], name)


def test_rows_of_a_batch_are_dealt_out_in_order():
    mesh = make_mesh(MeshConfig(2, 2, 2, 1))
    rows = place({"inputs_BT": BATCH["inputs_BT"]}, mesh)["inputs_BT"]
    np.testing.assert_array_equal(rows, BATCH["inputs_BT"])
    for shard in rows.addressable_shards:
        assert shard.data.shape == (ROWS // 4, LENGTH)


@pytest.mark.parametrize(
    ("wanted", "made"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(2, -1, 2, 1), (2, 2, 2, 1)),
        (MeshConfig(8, 1, 1, -1), (8, 1, 1, 1)),
    ],
)
def test_minus_one_takes_what_is_left(wanted, made):
    mesh = make_mesh(wanted)
    assert tuple(mesh.shape.items()) == tuple(zip(AXES, made, strict=True))
    assert mesh.axis_types == (AxisType.Explicit,) * 4


@pytest.mark.parametrize(
    "sizes", [(3, 1, 1, 1), (4, 1, 1, 1), (-1, 3, 1, 1), (16, 1, 1, 1)], ids=str
)
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(UserError, match=r"config\.mesh=.* does not fit 8 devices"):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize(
    ("sizes", "devices", "near"),
    [
        ((3, 1, 1, 1), 8, "data=8"),
        ((4, 1, 1, 1), 8, "data=8"),
        ((16, 1, 1, 1), 8, "data=8"),
        ((2, 8, 1, 1), 8, "fsdp=8|data=2,fsdp=4"),
    ],
)
def test_the_nearest_mesh_of_all_devices_is_named(sizes, devices, near):
    with pytest.raises(UserError) as refusal:
        mesh_shape(MeshConfig(*sizes), devices)
    assert any(f"or take {mesh}." in str(refusal.value) for mesh in near.split("|"))


WMT = {"data": {"target_length": 256, "tokens_per_batch": 96 * 256}}


@pytest.mark.parametrize(
    ("sizes", "changes", "words"),
    [
        ((64, 1, 1, 1), {}, "data=64 x config.mesh.fsdp=1 does not divide the rows.*=96; take"),
        ((1, 8, 1, 1), {"model": {"d_model": 20, "num_heads": 5}}, "d_model=20; take data=2,fsdp="),
        ((1, 1, 16, 1), {}, "tensor=16 does not divide config.model.num_heads=8; take data=2,tens"),
        ((1, 1, 8, 1), {"model": {"num_kv_heads": 2}}, "key heads=2; take data=4,tensor=2"),
        ((1, 1, 1, 3), {}, "context=3 does not divide config.data.target_length=256; take data=3"),
        ((1, 1, 1, 8), {"data": {"source_length": 300}}, "source_length=300; take data=2,context="),
    ],
    ids=str,
)
def test_a_mesh_that_cannot_split_evenly_is_refused_with_the_nearest_that_can(
    sizes, changes, words
):
    values = {part: WMT.get(part, {}) | changes.get(part, {}) for part in WMT.keys() | changes}
    config, shape = Config.of(values), dict(zip(AXES, sizes, strict=True))
    with pytest.raises(UserError, match=words) as refusal:
        check_mesh(config, shape)
    named = dict(
        part.split("=")
        for part in str(refusal.value).split("take ")[1].strip(".").split(", or")[0].split(",")
    )
    near = dict.fromkeys(AXES, 1) | {axis: int(size) for axis, size in named.items()}
    assert math.prod(near.values()) == math.prod(sizes)
    check_mesh(config, near)


def test_a_vocabulary_that_tensor_does_not_divide_is_refused_when_it_is_known():
    config, shape = Config.of(WMT), dict(zip(AXES, (1, 1, 8, 1), strict=True))
    check_mesh(config, shape)
    with pytest.raises(UserError, match=r"tensor=8 does not divide the vocabulary=300; take data="):
        check_mesh(config, shape, vocab_size=300)


def test_more_devices_than_rows_ask_for_a_larger_batch():
    config, shape = Config.of(WMT), dict(zip(AXES, (1024, 1, 1, 1), strict=True))
    with pytest.raises(
        UserError, match=r"or raise config\.data\.tokens_per_batch.*multiple of 1024"
    ):
        check_mesh(config, shape)
