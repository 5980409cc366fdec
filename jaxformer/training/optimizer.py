"""How far to step, and in which direction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxformer import trees
from jaxformer.config import Config, OptimizerConfig


def schedule(config: Config) -> optax.Schedule:
    """The learning rate as a function of the number of updates made so far.

    "paper" is equation 3 of Vaswani et al. (2017): a linear rise over the warm-up, then the inverse
    square root of the update. "cosine" and "linear" rise the same way to `learning_rate` and fall
    to zero at the last step of training.
    """
    optimizer, last = config.optimizer, config.train.steps
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    if optimizer.schedule == "paper":
        return lambda count: paper_rate(count, peak, config.model.d_model, warmup)
    warmup = min(warmup, last)
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    if optimizer.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, max(last - warmup, 1))
    else:
        fall = optax.linear_schedule(peak, 0.0, max(last - warmup, 1))
    return optax.join_schedules([rise, fall], [warmup])


def paper_rate(count: int | Array, factor: float, d_model: int, warmup: int) -> Array:
    """factor d_model^-0.5 min(n^-0.5, n warmup^-1.5) for update n = count + 1."""
    n = jnp.asarray(count, jnp.float32) + 1.0
    return factor * d_model**-0.5 * jnp.minimum(n**-0.5, n * max(warmup, 1) ** -1.5)


def make(config: Config) -> optax.GradientTransformation:
    """Adam or AdamW with the configured schedule, after clipping by the global norm."""
    c = config.optimizer
    parts = []
    if c.clip_norm:
        parts.append(optax.clip_by_global_norm(c.clip_norm))
    parts.append(optax.scale_by_adam(c.beta1, c.beta2, c.epsilon))
    if c.name == "adamw":
        parts.append(optax.add_decayed_weights(c.weight_decay, mask=decayed))
    parts.append(optax.scale_by_learning_rate(schedule(config)))
    return optax.chain(*parts)


def decayed(params):
    """Which parameters weight decay pulls to zero: matrices, not scales and biases."""
    return trees.unflatten(
        params,
        {
            name: not name.endswith("scale_D") and "bias" not in name.split("/")[-1]
            for name in trees.flatten(params)
        },
    )


def ema_decay(config: OptimizerConfig, updates: Array) -> Array:
    """Decay of the moving average: young averages forget faster, so that the start is not kept."""
    n = updates.astype(jnp.float32)
    return jnp.minimum(config.ema_decay, (1.0 + n) / (10.0 + n))


def moving_average(average, params, decay: Array):
    """decay * average + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), average, params)
