"""The same training on any mesh: fifty steps on 1, 2, 4 and 8 devices, and what is in the program."""

import functools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from training_cases import TINY, V, change, packed

from jaxformer import trees
from jaxformer.plan import hlo_text
from jaxformer.sharding import AXES, layout, place
from jaxformer.training import state as training_state
from jaxformer.training.optimizer import make
from jaxformer.training.step import train_step

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
ROWS, S, T = 8, 12, 10
BATCHES = [packed(seed) for seed in range(4)]
MESHES = [
    (1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2), (4, 1, 1, 1),
    (1, 4, 1, 1), (1, 1, 4, 1), (1, 2, 2, 1), (8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1),
    (2, 1, 2, 2), (1, 2, 2, 2),
]  # fmt: skip


def mesh_of(sizes) -> Mesh:
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def compiled(mesh: Mesh, config):
    """The step ahead of its run, and the fresh state."""
    optimizer = make(config)
    with jax.set_mesh(mesh):
        state = jax.jit(functools.partial(training_state.init, config, V, optimizer))()
        step = functools.partial(train_step, config=config, optimizer=optimizer)
        program = jax.jit(step, donate_argnums=0).lower(state, place(BATCHES[0], mesh)).compile()
    return program, state


@functools.cache
def trained(sizes):
    """Losses per token of every step, and the state after the last."""
    mesh = mesh_of(sizes)
    program, state = compiled(mesh, CONFIG)
    losses = []
    with jax.set_mesh(mesh):
        for index in range(STEPS):
            state, metrics = program(state, place(BATCHES[index % len(BATCHES)], mesh))
            losses.append(float(metrics["loss"]) / float(metrics["count"]))
    return losses, {name: np.asarray(leaf) for name, leaf in trees.flatten(state).items()}


@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_fifty_steps_are_those_of_one_device(sizes):
    losses, state = trained((1, 1, 1, 1))
    spread_losses, spread = trained(sizes)
    worst = max(abs(a - b) / a for a, b in zip(losses, spread_losses, strict=True))
    errors = {
        name: abs(spread[name] - value).max() / abs(value).max()
        for name, value in state.items()
        if name.startswith("params/") and "key_bias" not in name
    }
    print(sizes, worst, max(errors.items(), key=lambda x: x[1]), losses[0], losses[-1])
