"""A tiny model, random packed batches, and states made of both."""

import dataclasses
import functools
import math

import jax
import numpy as np

from jaxformer.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxformer.training import state as training_state
from jaxformer.training.optimizer import make
from jaxformer.training.step import train_step

V, ROWS, S, T = 32, 8, 12, 10

BOUND = 1e-5
"""Between layouts, after 50 steps; measured: losses 2.1e-7, parameters as one vector 3.3e-7.

Single query biases, whose gradients nearly cancel, are 6e-6 to 1.3e-5 away, by machine and mesh.
"""

TINY = Config(
    model=ModelConfig(
        d_model=16, num_heads=4, d_ff=24, encoder_layers=1, decoder_layers=1, dropout=0.0
    ),
    data=DataConfig(target_length=T, tokens_per_batch=ROWS * T),
    optimizer=OptimizerConfig(warmup_steps=10),
    train=TrainConfig(steps=100),
)


def change(config: Config, **fields) -> Config:
    """The config with fields given as section__name=value."""
    for name, value in fields.items():
        section, field = name.split("__")
        part = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def packed(seed: int, lengths=None, low: int = 4) -> dict[str, np.ndarray]:
    """A random packed batch: row i has sentences of lengths[i] = [(source, target), ...]."""
    rng = np.random.default_rng(seed)
    if lengths is None:
        lengths = [[(3, 2), (4, 5), (5, 3)], [(12, 10)], [(2, 2), (9, 7)], [(6, 5), (5, 4)]] * 2
    shapes = {"source": (S, "source_BS"), "target": (T, "inputs_BT")}
    batch = {}
    for name in ("source_BS", "source_segments_BS", "source_positions_BS"):
        batch[name] = np.zeros((ROWS, S), np.int32)
    for name in ("inputs_BT", "targets_BT", "target_segments_BT", "target_positions_BT"):
        batch[name] = np.zeros((ROWS, T), np.int32)
    for row, sentences in enumerate(lengths):
        starts = dict.fromkeys(shapes, 0)
        for segment, sizes in enumerate(sentences, 1):
            for side, size in zip(shapes, sizes, strict=True):
                letter = shapes[side][1][-1]
                there = (row, slice(starts[side], starts[side] + size))
                batch[shapes[side][1]][there] = rng.integers(low, V, size)
                batch[f"{side}_segments_B{letter}"][there] = segment
                batch[f"{side}_positions_B{letter}"][there] = range(size)
                if side == "target":
                    batch["targets_BT"][there] = rng.integers(low, V, size)
                starts[side] += size
    return batch


def fresh(config: Config):
    """A state as training begins with it."""
    return jax.jit(functools.partial(training_state.init, config, V, make(config)))()


@functools.cache
def stepper(config: Config):
    """The jitted step, which leaves its input alive: (state, batch) -> (state, metrics)."""
    return jax.jit(functools.partial(train_step, config=config, optimizer=make(config)))


def agree(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """As one vector within BOUND, and no array further away than ten times that."""
    assert got.keys() == wanted.keys()
    # No key bias has a gradient: what Adam makes of it is the noise of rounding.
    names = [name for name in wanted if "key_bias" not in name]
    errors = {name: got[name].astype(np.float64) - wanted[name] for name in names}
    assert norm(errors.values()) <= BOUND * norm(wanted[name] for name in names)
    for name, error in errors.items():
        assert norm([error]) <= 10 * BOUND * norm([wanted[name]]), name


def norm(arrays) -> float:
    """Of all numbers of the arrays as one vector."""
    return math.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in arrays))
