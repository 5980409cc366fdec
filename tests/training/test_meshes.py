"""The same training on any mesh: fifty steps on 1 to 8 devices, and what is in the program."""

import contextlib
import functools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from training_cases import BOUND, TINY, V, agree, change, packed

from jaxformer import trees
from jaxformer.checkpoint import Checkpoints
from jaxformer.plan import hlo_text
from jaxformer.plan.hlo import COLLECTIVES
from jaxformer.sharding import AXES, place
from jaxformer.training import state as training_state
from jaxformer.training.optimizer import make
from jaxformer.training.step import train_step

pytestmark = pytest.mark.xdist_group("meshes")  # one process, so that programs are compiled once

STEPS = 50
CONFIG = change(
    TINY,
    model__dropout=0.1,
    model__attention_dropout=0.1,
    optimizer__ema_decay=0.9,
    optimizer__learning_rate=0.3,
    optimizer__epsilon=1e-6,
    train__steps=STEPS,
)
ARRAY = re.compile(r"\b[a-z]+\d+\[([\d,]+)\]")
BATCHES = [packed(seed) for seed in range(4)]
MESHES = [
    (2, 1, 1, 1), (1, 1, 1, 2), (1, 1, 4, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2),
]  # fmt: skip


def mesh_of(sizes) -> Mesh:
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


@functools.cache
def compiled(sizes, config):
    """The compiled step of a mesh, and the compiled function that makes a fresh state."""
    mesh, optimizer = mesh_of(sizes), make(config)
    with jax.set_mesh(mesh):
        init = jax.jit(functools.partial(training_state.init, config, V, optimizer))
        state = training_state.abstract(config, V, optimizer, mesh)
        step = functools.partial(train_step, config=config, optimizer=optimizer)
        batch = place(BATCHES[0], mesh)
        return jax.jit(step, donate_argnums=0).lower(state, batch).compile(), init


@functools.cache
def trained(sizes):
    """Losses per token of every step, and the state after the last."""
    mesh = mesh_of(sizes)
    program, init = compiled(sizes, CONFIG)
    losses = []
    with jax.set_mesh(mesh):
        state = init()
        for index in range(STEPS):
            state, metrics = program(state, place(BATCHES[index % len(BATCHES)], mesh))
            losses.append(float(metrics["loss"]) / float(metrics["count"]))
    return losses, {name: np.asarray(leaf) for name, leaf in trees.flatten(state).items()}


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_fifty_steps_are_those_of_one_device(sizes):
    losses, state = trained((1, 1, 1, 1))
    spread_losses, spread = trained(sizes)
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(spread_losses, losses, rtol=BOUND)
    for tree in ("params", "ema"):
        names = [name for name in state if name.startswith(tree)]
        agree({name: spread[name] for name in names}, {name: state[name] for name in names})


def test_a_trained_state_saved_as_fsdp_comes_back_on_any_mesh(tmp_path):
    program, init = compiled((1, 8, 1, 1), CONFIG)
    mesh = mesh_of((1, 8, 1, 1))
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        with jax.set_mesh(mesh):
            state, _ = program(init(), place(BATCHES[0], mesh))
        checkpoints.save(1, training_state.to_named(state), {})
        wanted = trees.flatten(state)
        for sizes in [(1, 1, 1, 1), (1, 2, 1, 1), (1, 4, 1, 1), (1, 1, 4, 1), (2, 2, 2, 1)]:
            other = mesh_of(sizes)
            with jax.set_mesh(other):
                like = training_state.abstract(CONFIG, V, make(CONFIG), other)
            named, _ = checkpoints.restore(training_state.to_named(like))
            restored = trees.flatten(training_state.from_named(like, named))
            assert restored.keys() == wanted.keys()
            for name, leaf in restored.items():
                assert leaf.sharding.mesh.shape == other.shape
                np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


def shards(name: str, mesh: dict[str, int]) -> int:
    """Into how many parts an array falls, by the letters of its name and the table of axes."""
    letters = name.split("_")[-1]
    ways = {"D": "fsdp", "H": "tensor", "G": "tensor", "F": "tensor", "V": "tensor"}
    if letters == "D":  # norms and biases of the width are everywhere
        return 1
    return math.prod(mesh[ways[letter]] for letter in letters if letter in ways)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_device_holds_its_share_of_the_state_and_the_batch(sizes):
    mesh = mesh_of(sizes)
    program, init = compiled(sizes, CONFIG)
    with jax.set_mesh(mesh):
        state = init()
    wanted = 0
    for name, leaf in trees.flatten(state).items():
        parts = shards(name, mesh.shape) if leaf.ndim else 1
        held = {shard.data.nbytes for shard in leaf.addressable_shards}
        assert held == {leaf.nbytes // parts}, name
        wanted += leaf.nbytes // parts
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["context"]
    wanted += sum(rows.nbytes for rows in BATCHES[0].values()) // parts
    assert program.memory_analysis().argument_size_in_bytes == wanted


KINDS = {
    "data": ((2, 1, 1, 1), "ring", {"all-reduce"}),
    "fsdp": ((1, 8, 1, 1), "ring", {"all-gather", "all-reduce"}),
    "tensor": ((1, 1, 4, 1), "ring", {"all-reduce"}),
    "a ring": ((1, 1, 1, 2), "ring", {"all-reduce", "collective-permute"}),
    "gathered keys": ((1, 1, 1, 2), "gather", {"all-gather", "all-reduce"}),
}


@pytest.mark.parametrize(("sizes", "keys", "kinds"), KINDS.values(), ids=KINDS)
def test_the_program_has_the_collectives_of_its_mesh_and_no_others(sizes, keys, kinds):
    config = CONFIG if keys == "ring" else change(CONFIG, model__context_keys=keys)
    program, _ = compiled(sizes, config)
    found = re.findall(r" ([a-z\-]+?)(?:-start)?\(", program.as_text())
    assert {kind for kind in found if kind in COLLECTIVES} - {"reduce-scatter"} == kinds


@pytest.mark.parametrize("sizes", [(1, 1, 4, 1), (2, 2, 2, 1), (1, 2, 2, 2)], ids=str)
def test_logits_and_tables_are_never_whole_where_the_vocabulary_is_split(sizes):
    program, _ = compiled(sizes, CONFIG)
    computations, _ = hlo_text.parse(program.as_text())
    results = [i.result for body in computations.values() for i in body.values()]
    shapes = [re.findall(r"\d+", dimensions) for r in results for dimensions in ARRAY.findall(r)]
    assert any(str(V // sizes[2]) in shape for shape in shapes)
    assert not any(str(V) in shape for shape in shapes)
