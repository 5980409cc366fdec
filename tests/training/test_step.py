"""One step: what it must compute, and what must not change what it computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from training_cases import ROWS, TINY, V, change, fresh, packed, stepper

import jaxformer.attention as attention
from jaxformer import trees
from jaxformer.config import MeshConfig
from jaxformer.model import Transformer
from jaxformer.sharding import make_mesh, place
from jaxformer.training import state as training_state
from jaxformer.training.optimizer import make
from jaxformer.training.step import gradients, loss_sums, train_step

DROPPING = change(TINY, model__dropout=0.2, model__attention_dropout=0.1)
# With tables apart, only a source with a token sees that token's embedding.
AVERAGING = change(
    TINY, optimizer__ema_decay=0.9, model__share_embeddings=False, model__tie_output=False
)

# Of two or four micro-batches one has nearly all the tokens.
FULL, NEARLY_EMPTY = [(6, 5), (6, 5)], [(2, 1)]
UNEQUAL = packed(3, [FULL if row % 4 == 0 else NEARLY_EMPTY for row in range(ROWS)])


@functools.cache
def started(config):
    return fresh(config)


def arrays(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in trees.flatten(tree).items()}


def same_bits(a, b) -> bool:
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys()
    return all(a[name].tobytes() == b[name].tobytes() for name in a)


def close(got, wanted, tolerance):
    """Each array within `tolerance` of the largest number in it."""
    got, wanted = arrays(got), arrays(wanted)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        # No key bias has a gradient: it moves all scores of a query alike. What is left is noise.
        size = 1.0 if "key_bias" in name else max(abs(value).max(), 1e-3)
        assert abs(got[name] - value).max() <= tolerance * size, name


def test_loss_and_gradient_of_a_known_step():
    # Made by this very code (jax 0.10.2, CPU); tests/reference.py gives the same loss in float64
    # for these parameters and this batch. It holds initialisation, loss and gradient in place.
    _, metrics = stepper(TINY)(started(TINY), packed(0))
    assert float(metrics["count"]) == 76.0
    assert float(metrics["correct"]) == 2.0
    assert float(metrics["loss"] / metrics["count"]) == pytest.approx(4.153379, rel=1e-4)
    assert float(metrics["nll"] / metrics["count"]) == pytest.approx(4.171527, rel=1e-4)
    assert float(metrics["grad_norm"]) == pytest.approx(1.405937, rel=1e-4)


def test_a_run_with_the_tpu_kernel_has_the_losses_of_one_with_the_formula(monkeypatch):
    """20 steps of packed rows with dropout; the kernel is interpreted."""
    optimizer = make(DROPPING)

    def losses(implementation):
        monkeypatch.setattr(attention, "_order", lambda *_: (implementation,))
        step = jax.jit(functools.partial(train_step, config=DROPPING, optimizer=optimizer))
        state, found = started(DROPPING), []
        for number in range(20):
            state, metrics = step(state, packed(number))
            found.append(float(metrics["loss"] / metrics["count"]))
        return found

    wanted = losses("reference")
    assert max(wanted) - min(wanted) > 0.1
    np.testing.assert_allclose(losses("pallas_tpu"), wanted, rtol=1e-4)


@pytest.mark.parametrize("k", [2, 4])
def test_micro_batches_add_up_to_the_whole_batch(k):
    model = started(TINY)["params"]

    @functools.partial(jax.jit, static_argnums=0)
    def grads(config, model, batch):
        return gradients(model, batch, config, jax.random.key(0))

    whole, sums = grads(TINY, model, UNEQUAL)
    parts, part_sums = grads(change(TINY, optimizer__accumulate=k), model, UNEQUAL)
    counts = [(UNEQUAL["target_segments_BT"][i::k] > 0).sum() for i in range(k)]
    assert max(counts) >= 5 * min(counts)
    assert float(part_sums["count"]) == sum(counts)
    close(parts, whole, 1e-6)
    for name, value in sums.items():
        np.testing.assert_allclose(part_sums[name], value, rtol=1e-6)


def test_every_micro_batch_draws_its_own_dropout():
    twins = {name: np.repeat(rows[::2], 2, axis=0) for name, rows in packed(4).items()}
    config, key = change(DROPPING, optimizer__accumulate=2), jax.random.key(5)
    model = started(DROPPING)["params"]
    _, sums = jax.jit(lambda m, batch: gradients(m, batch, config, key))(model, twins)
    half = {name: rows[::2] for name, rows in twins.items()}
    lone = jax.jit(lambda m, key: loss_sums(m, half, config.train.label_smoothing, key))
    losses = [float(lone(model, jax.random.fold_in(key, i))["loss"]) for i in range(2)]
    assert float(sums["loss"]) == pytest.approx(sum(losses), rel=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[0]


def test_dropout_is_a_function_of_the_step():
    state, batch = started(DROPPING), packed(1)
    step = stepper(DROPPING)

    def loss(number):
        _, metrics = step(state | {"step": jnp.int32(number)}, batch)
        return float(metrics["loss"])

    losses = [loss(number) for number in range(4)]
    assert len(set(losses)) == 4
    assert losses == [loss(number) for number in range(4)]


def test_the_moving_average_follows_the_parameters():
    state = started(AVERAGING)
    assert same_bits(state["ema"], state["params"])
    wanted = {name: p.astype(np.float64) for name, p in arrays(state["params"]).items()}
    for number in range(3):
        state, _ = stepper(AVERAGING)(state, packed(number))
        decay = min(0.9, (1 + number) / (10 + number))
        for name, p in arrays(state["params"]).items():
            wanted[name] = decay * wanted[name] + (1 - decay) * p
    for name, average in arrays(state["ema"]).items():
        np.testing.assert_allclose(average, wanted[name], rtol=1e-5, atol=1e-7, err_msg=name)


POISONED_TOKEN = 1


def poisoned(batch):
    source = batch["source_BS"].copy()
    source[2, 0] = POISONED_TOKEN
    return batch | {"source_BS": source}


def test_a_batch_that_is_not_finite_changes_nothing_but_the_counters():
    state = started(AVERAGING)
    table = state["params"].embedding_VD
    model = trees.unflatten(
        state["params"],
        trees.flatten(state["params"])
        | {"embedding_VD": table[...].at[POISONED_TOKEN].set(3e38)},  # times sqrt(D): infinite
    )
    start = state | {"params": model, "ema": jax.tree.map(jnp.copy, model)}
    step, good = stepper(AVERAGING), packed(7)
    state = start
    for times in (1, 2):
        state, metrics = step(state, poisoned(packed(6)))
        assert not np.isfinite(float(metrics["loss"]))
        for part in ("params", "optimizer", "ema"):
            assert same_bits(state[part], start[part]), part
        counters = [int(state[name]) for name in ("step", "skipped", "skipped_in_row")]
        assert counters == [times, times, times]
        assert [int(metrics[name]) for name in ("skipped", "skipped_in_row")] == [times, times]
    state, metrics = step(state, good)
    assert [int(state[name]) for name in ("step", "skipped", "skipped_in_row")] == [3, 2, 0]
    assert np.isfinite(float(metrics["loss"]))
    # Skipped batches leave no trace at all: the good one does what it would have done first.
    undisturbed, _ = step(start, good)
    for part in ("params", "optimizer", "ema"):
        assert same_bits(state[part], undisturbed[part]), part
        assert not same_bits(state[part], start[part]), part


def test_a_finite_loss_with_an_infinite_gradient_is_skipped_too():
    state, batch = started(AVERAGING), packed(8)
    named = trees.flatten(state["params"])
    huge = named | {"output_VD": named["output_VD"] * 1e25}  # its square is no float32
    start = state | {"params": trees.unflatten(state["params"], huge)}
    state, metrics = stepper(AVERAGING)(start, batch)
    assert np.isfinite(float(metrics["loss"]))
    assert int(state["skipped"]) == 1
    for part in ("params", "optimizer", "ema"):
        assert same_bits(state[part], start[part]), part


def on_mesh(config, sizes, batch, steps=2):
    """The state after some steps on eight devices, and the losses."""
    mesh = make_mesh(MeshConfig(*sizes))
    optimizer = make(config)
    with jax.set_mesh(mesh):
        shapes = training_state.abstract(config, V, optimizer, mesh)
        layouts = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        state = jax.device_put(started(config), layouts)
        step = jax.jit(functools.partial(train_step, config=config, optimizer=optimizer))
        losses = []
        for _ in range(steps):
            state, metrics = step(state, place(batch, mesh))
            losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return state, losses, layouts


MESHED = change(
    DROPPING, optimizer__ema_decay=0.9, optimizer__epsilon=1e-3, optimizer__accumulate=2
)


def test_eight_devices_add_up_micro_batches_as_one_does():
    batch, sizes = packed(9), (2, 2, 2, 1)
    state, losses = started(MESHED), []
    for _ in range(2):
        state, metrics = stepper(MESHED)(state, batch)
        losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    spread, spread_losses, layouts = on_mesh(MESHED, sizes, batch)
    np.testing.assert_allclose(spread_losses, losses, rtol=1e-5)
    close(spread["params"], state["params"], 1e-5)
    close(spread["ema"], state["ema"], 1e-5)
    for name, leaf in trees.flatten(spread).items():
        layout = trees.flatten(layouts)[name]
        assert isinstance(layout, NamedSharding)
        assert leaf.sharding.is_equivalent_to(layout, leaf.ndim), name


def test_bfloat16_computes_on_float32_masters():
    config = change(
        TINY, model__dtype="bfloat16", optimizer__learning_rate=1e-4, optimizer__ema_decay=0.9
    )
    start = started(config)
    state, metrics = stepper(config)(start, packed(0))
    for name, leaf in trees.flatten(state).items():
        assert leaf.dtype in (jnp.float32, jnp.int32), name
    _, wanted = stepper(TINY)(started(TINY), packed(0))
    loss, exact = float(metrics["loss"]), float(wanted["loss"])
    assert loss == pytest.approx(exact, rel=1e-2)
    assert loss != exact
    # A move far too small for bfloat16 is kept.
    name = "encoder/blocks/feed_forward/up_DF"
    before, after = (arrays(s["params"])[name] for s in (start, state))
    assert (before != after).mean() > 0.9
    rounded = [w.astype(jnp.bfloat16) for w in (before, after)]
    assert (rounded[0] != rounded[1]).mean() < 0.1


def test_rematerialisation_changes_no_number():
    model, batch, key = started(DROPPING)["params"], packed(2), jax.random.key(3)

    @functools.partial(jax.jit, static_argnums=0)
    def grads(config, model):
        # The module carries the switch: parameters of one and the code of the other.
        shapes = jax.eval_shape(lambda: Transformer(config.model, V, jax.random.key(0)))
        model = trees.unflatten(shapes, trees.flatten(model))
        return gradients(model, batch, config, key)

    again = change(DROPPING, model__remat=True)
    programs = [str(jax.make_jaxpr(functools.partial(grads, c))(model)) for c in (DROPPING, again)]
    assert ["remat" in program or "checkpoint" in program for program in programs] == [False, True]
    (plain, sums), (remat, remat_sums) = grads(DROPPING, model), grads(again, model)
    np.testing.assert_allclose(remat_sums["loss"], sums["loss"], rtol=1e-6)
    close(remat, plain, 1e-5)
