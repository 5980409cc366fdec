"""What training carries from one step to the next."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer import trees
from jaxformer.config import Config
from jaxformer.model import Transformer

State = dict[str, Any]
"""params, optimizer, ema (only if on), step, skipped, skipped_in_row.

`step` counts the batches seen, `skipped` those whose update was left out for being non-finite.
"""


def init(config: Config, vocab_size: int, optimizer: optax.GradientTransformation) -> State:
    """A fresh state, a function of the config alone; under `jit` it is born sharded."""
    params = Transformer(config.model, vocab_size, jax.random.key(config.seed))
    # A leaf of its own for every counter: donated buffers must not be shared.
    counters = {name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "skipped_in_row")}
    state = {"params": params, "optimizer": optimizer.init(params), **counters}
    if config.optimizer.ema_decay:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def abstract(
    config: Config, vocab_size: int, optimizer: optax.GradientTransformation, mesh: Mesh
) -> State:
    """Shapes, types and shardings of the state, with nothing computed."""
    shapes = jax.eval_shape(lambda: init(config, vocab_size, optimizer))

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        layout = P() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, layout))

    return jax.tree.map(place, shapes)


def to_named(state: State) -> dict[str, dict[str, Array]]:
    """The state as {"params": {name: array}, ...}: the form in which it is stored."""
    return {part: trees.flatten(tree) for part, tree in _parts(state).items()}


def from_named(like: State, named: dict[str, dict[str, Array]]) -> State:
    """The state with the tree of `like` and the arrays of `named`."""
    parts = {part: trees.unflatten(tree, named[part]) for part, tree in _parts(like).items()}
    return parts.pop("counters") | parts


def _parts(state: State) -> dict[str, Any]:
    trained = {name: state[name] for name in ("params", "optimizer", "ema") if name in state}
    counters = {name: leaf for name, leaf in state.items() if name not in trained}
    return trained | {"counters": counters}
