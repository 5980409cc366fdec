"""Checkpoints come back bit for bit, on other meshes, and survive kills, full disks and damage."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer.checkpoint import Checkpoints, files, load_weights
from jaxformer.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")
META = {"config": {"model": {"d_model": 8}}, "tokenizer": "bW9kZWw=", "step": 3, "best": None}


def mesh(*sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, AXES, (AxisType.Explicit,) * 4, devices=devices)


def optimizer():
    """With counters, empty states, masks and accumulators in its state."""

    def matrices(params):
        return jax.tree.map(lambda w: w.ndim > 1, params)

    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.linear_schedule(0.1, 0.0, 9), weight_decay=0.1, mask=matrices),
    )
    return optax.MultiSteps(chain, every_k_schedule=2)


@partial(jax.jit, static_argnames=("meshed", "ema"))
def make_state(key, meshed, ema):
    def draw(n, shape, dtype, *axes):
        layout = {"out_sharding": P(*axes)} if meshed else {}
        return jax.random.normal(jax.random.fold_in(key, n), shape, dtype, **layout)

    params = {
        "stack": {"w_LDF": draw(0, (2, 8, 4), jnp.float32, None, "fsdp", "tensor")},
        "table_VD": draw(1, (16, 8), jnp.float32, "tensor", None),
        "scale_D": draw(2, (8,), jnp.bfloat16, None),
    }
    state = {"params": params, "optimizer": optimizer().init(params)}
    counters = {"step": jnp.int32(3), "nonfinite": jnp.int32(1)}
    return state | ({"ema": jax.tree.map(lambda w: w * 2, params)} if ema else {}) | counters


def new_state(seed=0, ema=True):
    """A state in the layout of the mesh that is set (or of one device)."""
    return make_state(jax.random.key(seed), not jax.sharding.get_abstract_mesh().empty, ema)


def abstract(state):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "run", keep=3)
    yield opened
    opened.close()


def saved(checkpoints, *steps):
    """{step: state} of states of different values, all on disk."""
    states = {step: new_state(seed=step) for step in steps}
    for step, state in states.items():
        checkpoints.save(step, state, META | {"step": step})
    checkpoints.wait()
    return states


def largest_file(path):
    return max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "target", [(4, 1, 2, 1), (1, 2, 1, 1)], ids=["same_mesh", "8_to_2_devices"]
)
def test_round_trip_is_bitwise_on_explicit_meshes(checkpoints, target):
    with jax.set_mesh(mesh(4, 1, 2, 1)):
        state = new_state()
        checkpoints.save(3, state, META)
    other = mesh(*target)
    with jax.set_mesh(other):
        wanted = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=NamedSharding(other, a.sharding.spec)
            ),
            state,
        )
        got, meta = checkpoints.restore(wanted)
    assert_same(got, state)
    assert meta == META
    assert jax.tree.map(lambda a: a.sharding, got) == jax.tree.map(lambda a: a.sharding, wanted)


@pytest.mark.parametrize("target", [(1, 1, 1, 1), (1, 2, 1, 1), (1, 4, 1, 1), (2, 1, 4, 1)])
def test_eight_devices_as_fsdp_come_back_on_fewer_and_as_tensor(checkpoints, target):
    with jax.set_mesh(mesh(1, 8, 1, 1)):
        state = new_state()
        assert "fsdp" in state["params"]["stack"]["w_LDF"].sharding.spec
        checkpoints.save(3, state, META)
    other = mesh(*target)
    with jax.set_mesh(other):
        got, _ = checkpoints.restore(abstract(new_state(seed=1)))
    assert_same(got, state)
    assert got["params"]["stack"]["w_LDF"].sharding.mesh.shape == other.shape


def test_arrays_may_be_donated_as_soon_as_save_returns(checkpoints):
    train_step = jax.jit(lambda s: jax.tree.map(lambda a: a + a, s), donate_argnums=0)
    jax.block_until_ready(train_step({"params": {"w": jnp.zeros(1 << 20)}}))  # compiled
    state = {"params": {"w": jnp.arange(1 << 20, dtype=jnp.float32)}}
    want, target = np.array(state["params"]["w"]), abstract(state)
    checkpoints.save(1, state, META)
    for _ in range(5):
        state = train_step(state)
    got, _ = checkpoints.restore(target)
    np.testing.assert_array_equal(np.asarray(got["params"]["w"]), want)


def test_last_n_are_kept_and_the_same_step_is_replaced(checkpoints):
    assert checkpoints.latest() is None
    states = saved(checkpoints, 1, 2, 5, 10)
    assert checkpoints.steps() == [2, 5, 10]
    checkpoints.save(10, states[1], META)
    got, meta = checkpoints.restore(abstract(states[1]))
    assert_same(got, states[1])
    assert meta == checkpoints.meta() == META
    assert checkpoints.meta(5)["step"] == 5
    assert_same(checkpoints.restore(abstract(states[5]), step=5)[0], states[5])


def test_the_best_is_kept_besides_the_last(tmp_path):
    opened = Checkpoints(tmp_path / "run", keep=2, keep_best=1)
    for step, score in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, 4.0)):
        opened.save(step, new_state(seed=step), META, score)
    opened.wait()
    assert opened.steps() == [2, 4, 5]
    opened.save(6, new_state(seed=6), META, 1.0)  # as good, and newer
    opened.save(7, new_state(seed=7), META, 9.0)
    opened.save(8, new_state(seed=8), META, 9.0)
    opened.close()
    assert opened.steps() == [6, 7, 8]


def test_a_run_that_got_further_is_not_overwritten(checkpoints):
    states = saved(checkpoints, 20)
    with pytest.raises(UserError, match="holds step 20"):
        checkpoints.save(10, states[20], META)


KILLED_DURING_SAVE = """
    import os, signal, sys
    import jax.numpy as jnp
    from jaxformer.checkpoint import Checkpoints
    checkpoints = Checkpoints(sys.argv[1], keep=3)
    checkpoints.save(1, {"params": {"w": jnp.ones(8)}}, {"step": 1})
    checkpoints.save(2, {"params": {"w": jnp.ones(1 << 23)}}, {"step": 2})
    while not any(path.name.startswith("2.") for path in checkpoints.directory.iterdir()):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_during_save_leaves_the_step_before(tmp_path):
    script = [sys.executable, "-c", textwrap.dedent(KILLED_DURING_SAVE), str(tmp_path)]
    killed = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(os.listdir(tmp_path / "checkpoints")) == 2
    weights, meta = load_weights(tmp_path)
    assert meta == {"step": 1}
    np.testing.assert_array_equal(weights["w"], np.ones(8, np.float32))
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    state = {"params": {"w": jnp.zeros(8)}}
    checkpoints.save(2, state, {})
    assert_same(checkpoints.restore(abstract(state))[0], state)
    checkpoints.close()


def truncate(path):
    os.truncate(largest_file(path), largest_file(path).stat().st_size // 2)


DAMAGES = {
    "truncated": truncate,
    "flipped_bit": lambda path: flip(largest_file(path / "train")),
    "no_meta": lambda path: (path / "meta.json").unlink(),
    "no_manifest": lambda path: (path / "manifest.json").unlink(),
    "no_seal": lambda path: (path / "manifest.sha256").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_step_is_set_aside_with_one_warning(checkpoints, caplog, damage):
    states = saved(checkpoints, 1, 2)
    newest = checkpoints.directory / "2"
    damage(newest)
    got, meta = checkpoints.restore(abstract(states[1]))
    assert_same(got, states[1])
    assert meta["step"] == 1
    (warning,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert f"{newest} is damaged" in warning.getMessage()
    assert checkpoints.steps() == [1]
    saved(checkpoints, 2)
    assert checkpoints.restore(abstract(states[2]))[1]["step"] == 2


def test_no_bit_of_any_file_can_change_unseen(checkpoints):
    saved(checkpoints, 1)
    step = checkpoints.directory / "1"
    for file in (f for f in step.rglob("*") if f.is_file()):
        written = file.read_bytes()
        for place in range(0, len(written), 1 if file.parent == step else 97):
            changed = bytearray(written)
            changed[place] ^= 1 << place % 8
            file.write_bytes(changed)
            assert files.damage(step, None), (file, place)
        file.write_bytes(written)
    assert not files.damage(step, None)


def test_a_damaged_step_asked_for_by_number_is_an_error(checkpoints):
    states = saved(checkpoints, 1, 2)
    flip(largest_file(checkpoints.directory / "2" / "params"))
    with pytest.raises(UserError, match=r"2 is damaged \(params/.* has changed"):
        checkpoints.restore(abstract(states[2]), step=2)
    with pytest.raises(UserError, match=r"2 is damaged"):
        load_weights(checkpoints.workdir, step=2)


def test_when_all_are_damaged_nothing_is_renamed(checkpoints):
    states = saved(checkpoints, 1, 2)
    for step in (1, 2):
        flip(largest_file(checkpoints.directory / str(step)))
    with pytest.raises(UserError, match="no undamaged checkpoint"):
        checkpoints.restore(abstract(states[2]))
    assert checkpoints.steps() == [1, 2]


def test_a_step_of_another_config_is_named_by_its_first_different_array(checkpoints):
    state = saved(checkpoints, 1)[1]
    wanted = abstract(state)
    wanted["params"]["table_VD"] = jax.ShapeDtypeStruct((16, 4), jnp.float32)
    with pytest.raises(
        UserError, match=r"table_VD'\] is float32\[16,8\] there and float32\[16,4\]"
    ):
        checkpoints.restore(wanted)
    without_ema = {name: tree for name, tree in abstract(state).items() if name != "ema"}
    with pytest.raises(UserError, match=r"'ema'.* and absent here"):
        checkpoints.restore(without_ema)


ONE_DEVICE = """
    import sys
    import numpy as np
    from jaxformer.checkpoint import load_weights
    weights, meta = load_weights(sys.argv[1])
    np.savez(sys.argv[2], table=weights["table_VD"], stack=weights["stack"]["w_LDF"])
    assert weights["scale_D"].dtype.name == "bfloat16" and meta["step"] == 3
    import jax
    assert jax.device_count() == 1
"""


def test_weights_written_by_8_devices_load_on_one_without_a_word(checkpoints, tmp_path):
    with jax.set_mesh(mesh(4, 1, 2, 1)):
        state = new_state(ema=False)
        checkpoints.save(3, state, META)
    checkpoints.wait()
    out = tmp_path / "out.npz"
    workdir = str(checkpoints.workdir)
    script = [sys.executable, "-c", textwrap.dedent(ONE_DEVICE), workdir, str(out)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    arrays = np.load(out)
    np.testing.assert_array_equal(arrays["table"], np.asarray(state["params"]["table_VD"]))
    np.testing.assert_array_equal(arrays["stack"], np.asarray(state["params"]["stack"]["w_LDF"]))


def test_weights_are_the_moving_average_if_there_is_one(checkpoints):
    state = saved(checkpoints, 1)[1]
    # Damage elsewhere does not matter to a translator.
    flip(largest_file(checkpoints.directory / "1" / "train"))
    assert_same(load_weights(checkpoints.workdir)[0], state["ema"])


def test_average_of_the_last_checkpoints(checkpoints):
    states = saved(checkpoints, 1, 2, 3)
    weights, meta = load_weights(checkpoints.workdir, average=2)
    assert meta["step"] == 3
    for name in ("table_VD", "scale_D"):
        a, b = (np.asarray(states[step]["ema"][name]) for step in (2, 3))
        mean = (a.astype(np.float64) + b.astype(np.float64)) / 2
        assert weights[name].dtype == a.dtype
        np.testing.assert_array_equal(weights[name], mean.astype(a.dtype))
    weights, meta = load_weights(checkpoints.workdir, step=2, average=1)
    assert_same(weights, states[2]["ema"])
    with pytest.raises(UserError, match="holds 3 usable checkpoints, too few to average 4"):
        load_weights(checkpoints.workdir, average=4)
    with pytest.raises(UserError, match="no checkpoint of step 7; it has 1, 2, 3"):
        load_weights(checkpoints.workdir, step=7)


def test_a_workdir_without_checkpoints_says_how_to_make_one(tmp_path):
    for workdir in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=r"holds no checkpoint; train it first .*--workdir="):
            load_weights(workdir)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Checkpoints(tmp_path / "file", keep=1)


def test_a_full_disk_is_one_sentence_and_costs_no_earlier_step(tmp_path):
    small_disk = tmp_path / "disk"
    small_disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small_disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        checkpoints = Checkpoints(small_disk, keep=3)
        small = {"params": {"w": jnp.ones(8)}}
        checkpoints.save(1, small, META)
        checkpoints.save(2, {"params": {"w": jnp.ones(1 << 21)}}, META)
        with pytest.raises(UserError, match=r"checkpoints/2 could not be saved, the disk is full"):
            checkpoints.wait()
        assert os.listdir(checkpoints.directory) == ["1"]
        checkpoints.save(3, small, META)
        assert_same(checkpoints.restore(abstract(small))[0], small)
        checkpoints.close()
    finally:
        subprocess.run(["umount", "--lazy", str(small_disk)], check=True)


FAILS_AT_ONCE = """
    import sys
    import jax.numpy as jnp
    from jaxformer.checkpoint import Checkpoints
    w = jnp.ones(8)
    w.delete()
    Checkpoints(sys.argv[1], keep=3).save(1, {"params": {"w": w}}, {})
"""


def test_a_save_that_fails_at_once_does_not_hold_the_process(tmp_path):
    script = [sys.executable, "-c", textwrap.dedent(FAILS_AT_ONCE), str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Array has been deleted" in done.stderr


def test_orbax_chatter_stays_off_the_log(checkpoints, caplog):
    with caplog.at_level(logging.DEBUG):
        saved(checkpoints, 1)
        logging.getLogger("absl").info("kept: not from Orbax")
    names = {record.getMessage() for record in caplog.records if record.name == "absl"}
    assert names == {"kept: not from Orbax"}


def test_the_parts_of_a_step_are_separate_and_meta_is_plain_json(checkpoints):
    saved(checkpoints, 1)
    path = checkpoints.directory / "1"
    assert {part.name for part in path.iterdir() if part.is_dir()} == {"params", "ema", "train"}
    assert json.loads((path / "meta.json").read_text())["config"] == META["config"]
    names = " ".join(json.loads((path / "train" / "_METADATA").read_text())["tree_metadata"])
    assert "optimizer" in names
    assert "table_VD" in names  # the moments
    assert "'params'" not in names  # the weights are stored once
