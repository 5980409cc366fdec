"""One step of gradient descent, as a pure function of (state, batch)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxformer.config import Config
from jaxformer.model import Transformer, forward
from jaxformer.model.loss import Sums, cross_entropy
from jaxformer.sharding import spec
from jaxformer.training.optimizer import ema_decay, moving_average
from jaxformer.training.state import State

Batch = dict[str, Array]


def loss_sums(model: Transformer, batch: Batch, smoothing: float, key: Array | None) -> Sums:
    """Loss and counts summed over the target tokens of a batch; `key` turns dropout on."""
    x_BTD = forward(model, batch, key)
    real_BT = batch["target_segments_BT"] > 0
    return cross_entropy(model, x_BTD, batch["targets_BT"], real_BT, smoothing)


def gradients(
    model: Transformer, batch: Batch, config: Config, key: Array
) -> tuple[Transformer, Sums]:
    """Gradient of the mean loss per target token, and the sums it came from.

    With `accumulate` the batch is taken in so many micro-batches. Sums are added, and divided by
    the tokens of the whole batch at the end, so a micro-batch with few tokens weighs little.
    """

    def loss(model: Transformer, micro: Batch, key: Array) -> tuple[Array, Sums]:
        sums = loss_sums(model, micro, config.train.label_smoothing, key)
        return sums["loss"], sums

    gradient = jax.grad(loss, has_aux=True)
    k = config.optimizer.accumulate
    if k == 1:
        grads, sums = gradient(model, batch, key)
    else:
        # Micro-batch i takes every k-th row, so that no row leaves its device.
        micro_batches = {
            name: jnp.moveaxis(
                rows.reshape(-1, k, rows.shape[1], out_sharding=spec("batch", None, "length")), 1, 0
            )
            for name, rows in batch.items()
        }

        def add(total: Any, micro_and_index: Any) -> tuple[Any, None]:
            micro, index = micro_and_index
            more = gradient(model, micro, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, more), None

        zero = {name: jnp.zeros(()) for name in ("loss", "nll", "correct", "count")}
        start = (jax.tree.map(jnp.zeros_like, model), zero)
        (grads, sums), _ = jax.lax.scan(add, start, (micro_batches, jnp.arange(k)))
    tokens = jnp.maximum(sums["count"], 1.0)
    return jax.tree.map(lambda g: g / tokens, grads), sums


def train_step(
    state: State, batch: Batch, *, config: Config, optimizer: optax.GradientTransformation
) -> tuple[State, dict[str, Array]]:
    """One update; or none, if the loss or the gradient is not finite.

    Args:
      state: see `training.state`; its buffers may be donated.
      batch: a packed batch of the data layer.
      config: fixed under jit.
      optimizer: fixed under jit.

    Returns:
      The next state, and scalars: the sums of the loss, the gradient's norm (before clipping) and
      the counters of skipped updates.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
    grads, sums = gradients(state["params"], batch, config, key)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(norm)
    trained = {name: state[name] for name in ("params", "optimizer", "ema") if name in state}
    updates = state["step"] - state["skipped"]
    trained = jax.lax.cond(
        finite, lambda old: update(old, grads, updates, config, optimizer), dict, trained
    )
    bad = 1 - finite.astype(jnp.int32)
    counters = {
        "step": state["step"] + 1,
        "skipped": state["skipped"] + bad,
        "skipped_in_row": (state["skipped_in_row"] + 1) * bad,
    }
    metrics = sums | {
        "grad_norm": norm,
        "skipped": counters["skipped"],
        "skipped_in_row": counters["skipped_in_row"],
    }
    return trained | counters, metrics


def update(
    trained: State,
    grads: Transformer,
    updates: Array,
    config: Config,
    optimizer: optax.GradientTransformation,
) -> State:
    """Parameters, optimizer state and moving average after `updates` and one more, by `grads`."""
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes Python numbers and int32 counters
        moves, optimizer_state = optimizer.update(grads, trained["optimizer"], trained["params"])
    params = optax.apply_updates(trained["params"], moves)
    new = {"params": params, "optimizer": optimizer_state}
    if "ema" in trained:
        decay = ema_decay(config.optimizer, updates)
        new["ema"] = moving_average(trained["ema"], params, decay)
    return new


def add_sums(a: Sums, b: Sums) -> Sums:
    """The sums of two sets of tokens together."""
    return {name: a[name] + b[name] for name in a}
