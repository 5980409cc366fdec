"""The schedules against their formulas; Adam, AdamW and clipping against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_cases import TINY, V, change

from jaxformer import trees
from jaxformer.config import Config, OptimizerConfig
from jaxformer.model import Transformer
from jaxformer.training.optimizer import decayed, ema_decay, make, moving_average, schedule
from jaxformer.training.step import update

PEAK = 3e-3


def test_the_papers_schedule_is_equation_3():
    rate = schedule(Config())
    for n in (1, 2000, 4000, 16_000):
        wanted = 512**-0.5 * min(n**-0.5, n * 4000**-1.5)
        np.testing.assert_allclose(float(rate(n - 1)), wanted, rtol=1e-6)
        np.testing.assert_allclose(float(rate(jnp.int32(n - 1))), wanted, rtol=1e-6)
    np.testing.assert_allclose(float(rate(3999)), 6.987712429686844e-4, rtol=1e-6)
    doubled = schedule(change(Config(), optimizer__learning_rate=2.0))
    assert float(doubled(1999)) == pytest.approx(2 * float(rate(1999)), rel=1e-6)


def scheduled(name, warmup, steps):
    config = change(
        Config(),
        optimizer__schedule=name,
        optimizer__learning_rate=PEAK,
        optimizer__warmup_steps=warmup,
        train__steps=steps,
    )
    return [float(schedule(config)(count)) for count in range(steps + 1)]


FALLS = {"cosine": lambda share: (1 + np.cos(np.pi * share)) / 2, "linear": lambda share: 1 - share}


@pytest.mark.parametrize("name", FALLS)
@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_cosine_and_linear_rise_to_the_peak_and_end_at_zero(name, warmup):
    steps = 100
    rates = scheduled(name, warmup, steps)
    rise = [PEAK * (count + 1) / warmup for count in range(warmup)]
    fall = [PEAK * FALLS[name]((count - warmup) / (steps - warmup)) for count in range(warmup, 101)]
    np.testing.assert_allclose(rates, rise + fall, rtol=1e-5, atol=1e-9)
    assert max(rates) == pytest.approx(PEAK) == rates[max(warmup - 1, 0)]
    assert rates[steps] == pytest.approx(0.0, abs=1e-9)


def test_a_warm_up_longer_than_the_run_ends_with_the_run():
    rates = scheduled("cosine", 50, 10)
    np.testing.assert_allclose(rates[:10], PEAK * np.arange(1, 11) / 10, rtol=1e-5)


def test_without_warm_up_the_papers_schedule_only_falls():
    rate = schedule(change(Config(), optimizer__warmup_steps=0))
    np.testing.assert_allclose(
        [float(rate(count)) for count in (0, 3, 99)], 512**-0.5 / np.array([1, 2, 10]), rtol=1e-6
    )


ADAM = {"optimizer__beta1": 0.8, "optimizer__beta2": 0.95, "optimizer__epsilon": 1e-5}
ADAMW = ADAM | {
    "optimizer__name": "adamw",
    "optimizer__weight_decay": 0.3,
    "optimizer__schedule": "linear",
    "optimizer__learning_rate": 0.05,
}
OPTIMIZERS = {
    "the paper's": {},
    "adam": ADAM,
    "adam, clipped": ADAM | {"optimizer__clip_norm": 2.0},
    "adamw": ADAMW,
    "adamw, clipped": ADAMW | {"optimizer__clip_norm": 2.0},
}


class NumpyAdam:
    """Kingma & Ba (2015), algorithm 1, and the decoupled decay of Loshchilov & Hutter (2019)."""

    def __init__(self, c: OptimizerConfig, params: dict[str, np.ndarray]):
        self.c = c
        self.params = {name: np.asarray(p, np.float64) for name, p in params.items()}
        self.m = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.v = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.t = 0

    def step(self, grads: dict[str, np.ndarray], rate: float, matrices: set[str]) -> None:
        c = self.c
        self.t += 1
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        scale = min(1.0, c.clip_norm / norm) if c.clip_norm else 1.0
        for name, p in self.params.items():
            g = grads[name].astype(np.float64) * scale
            self.m[name] = c.beta1 * self.m[name] + (1 - c.beta1) * g
            self.v[name] = c.beta2 * self.v[name] + (1 - c.beta2) * g**2
            m, v = self.m[name] / (1 - c.beta1**self.t), self.v[name] / (1 - c.beta2**self.t)
            decay = c.weight_decay if c.name == "adamw" and name in matrices else 0.0
            self.params[name] = p - rate * (m / (np.sqrt(v) + c.epsilon) + decay * p)


SHAPES = {"table_VD": (7, 4), "norm/scale_D": (4,), "up_DF": (4, 6), "up_bias_F": (6,)}
MATRICES = {"table_VD", "up_DF"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_updates_are_those_of_numpy(name):
    config = change(TINY, optimizer__warmup_steps=2, train__steps=6, **OPTIMIZERS[name])
    c, optimizer = config.optimizer, make(config)
    rng = np.random.default_rng(0)

    def draw(size):
        return {n: (size * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}

    start = draw(1.0)
    twin = NumpyAdam(c, start)
    params = jax.tree.map(jnp.asarray, start)
    trained = {"params": params, "optimizer": optimizer.init(params)}
    step = jax.jit(lambda trained, grads: update(trained, grads, jnp.int32(0), config, optimizer))
    rates = (
        [c.learning_rate * share for share in (0.5, 1.0, 1.0)]
        if c.schedule == "linear"
        else [c.learning_rate * 16**-0.5 * min(n**-0.5, n * 2**-1.5) for n in (1, 2, 3)]
    )
    # The second gradient is shorter than the longest allowed, the others are clipped.
    for rate, size in zip(rates, (1.0, 0.01, 3.0), strict=True):
        grads = draw(size)
        trained = step(trained, jax.tree.map(jnp.asarray, grads))
        twin.step(grads, rate, MATRICES)
    for name, wanted in twin.params.items():
        np.testing.assert_allclose(trained["params"][name], wanted, atol=1e-6, err_msg=name)
    (adam,) = (s for s in trained["optimizer"] if isinstance(s, optax.ScaleByAdamState))
    for moments, wanted in ((adam.mu, twin.m), (adam.nu, twin.v)):
        for name in SHAPES:
            np.testing.assert_allclose(moments[name], wanted[name], rtol=1e-5, atol=1e-7)


def test_weight_decay_pulls_matrices_and_nothing_else():
    config = change(TINY, model__positions="learned", model__tie_output=False)
    shapes = jax.eval_shape(lambda: Transformer(config.model, V, jax.random.key(0)))
    names = {True: set(), False: set()}
    for name, pulled in trees.flatten(decayed(shapes)).items():
        names[pulled].add(name.split("/")[-1])
    assert names[True] == {
        *("embedding_VD", "output_VD", "source_positions_TD", "target_positions_TD"),
        *("query_DHK", "key_DGK", "value_DGK", "output_HKD", "up_DF", "down_FD"),
    }
    assert names[False] == {
        *("scale_D", "bias_D", "query_bias_HK", "key_bias_GK", "value_bias_GK", "output_bias_D"),
        *("up_bias_F", "down_bias_D"),
    }


def test_the_moving_average_forgets_its_first_values_faster():
    c = OptimizerConfig(ema_decay=0.9)
    with jax.numpy_dtype_promotion("standard"):
        decays = [float(ema_decay(c, jnp.int32(n))) for n in (0, 1, 8, 79, 81, 10_000)]
    np.testing.assert_allclose(decays, [1 / 10, 2 / 11, 9 / 18, 80 / 89, 0.9, 0.9], rtol=1e-6)
    average = moving_average({"a": jnp.float32(1.0)}, {"a": jnp.float32(3.0)}, jnp.float32(0.75))
    assert float(average["a"]) == 1.5
