"""Real processes: equal numbers in one and in two, and a name for whoever is missing."""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from process_cases import ended, start, together
from run_cases import flags, small, write_text
from training_cases import BOUND, agree

from jaxformer.launch.local import free_port

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.long]

STEPS = 50
OPTIONS = {
    "model__dropout": 0.1,
    "optimizer__epsilon": 1e-6,
    "optimizer__ema_decay": 0.9,
    "data__valid": "",
    "data__test": "",
    "train__steps": STEPS,
    "train__checkpoint_every": STEPS // 2,
    "train__keep_checkpoints": 9,
}
MIXED = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    write_text(path)
    return path


def options(folder, workdir, **changes):
    return [*flags(small(folder, **OPTIONS | changes)), f"--workdir={workdir}"]


def arrays(workdir, step):
    """{name: array} of everything in a checkpoint."""
    path = workdir / "checkpoints" / str(step)
    stored = ocp.checkpointables_metadata(path).metadata
    like = {
        name: jax.tree.map(lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape), stored[name])
        for name in ("params", "ema", "train")
    }
    loaded = ocp.load_checkpointables(path, like)
    leaves, _ = jax.tree_util.tree_flatten_with_path(loaded)
    return {jax.tree_util.keystr(where): np.asarray(leaf) for where, leaf in leaves}


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"]) for r in map(json.loads, lines)]


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """50 steps in one process on 1 and 2 devices, and in two of 1 and 4 devices, by folder."""
    root = tmp_path_factory.mktemp("runs")
    (code,), said = ended([start(options(folder, root / "one"))])
    assert code == 0, said
    wide = options(folder, root / "two_devices", mesh__data=1, mesh__fsdp=2)
    (code,), said = ended([start(wide, devices=2)])
    assert code == 0, said
    both = options(folder, root / "two", mesh__data=1, mesh__fsdp=2)
    codes, said = together(both, 2)
    assert codes == [0, 0], said
    codes, mixed_said = together(options(folder, root / "mixed", **MIXED), 2, devices=4)
    assert codes == [0, 0], mixed_said
    return root, said


@pytest.mark.parametrize("name", ["two", "mixed"])
def test_two_processes_train_as_one(runs, name):
    root, _ = runs
    one, two = arrays(root / "one", STEPS), arrays(root / name, STEPS)
    agree(two, one)
    assert [step for step, _ in losses(root / name)] == [*range(1, STEPS + 1)]
    np.testing.assert_allclose(losses(root / name), losses(root / "one"), rtol=BOUND)


def test_the_same_layout_is_bitwise_the_same_in_one_process_and_in_two(runs):
    root, _ = runs
    assert losses(root / "two") == losses(root / "two_devices")
    assert_same(arrays(root / "two", STEPS), arrays(root / "two_devices", STEPS))


def test_process_0_alone_speaks_and_says_where_the_time_went(runs):
    _, (first, second) = runs
    assert "Where " in first
    assert "waiting for input" in first
    assert "report.html" in first
    assert [line for line in second.splitlines() if "Gloo" not in line] == []


@pytest.mark.parametrize(("writer", "readers"), [("two", 1), ("two_devices", 2)])
def test_a_run_goes_on_in_another_number_of_processes(runs, folder, tmp_path, writer, readers):
    """Half by two processes and half by one, on the same layout, is bitwise the whole run."""
    root, _ = runs
    shutil.copytree(root / writer, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    run = options(folder, tmp_path / "run", mesh__data=1, mesh__fsdp=2)
    codes, said = together(run, 2) if readers == 2 else ended([start(run, devices=2)])
    assert set(codes) == {0}, said
    assert f"Going on from step {STEPS // 2}" in said[0]
    assert losses(tmp_path / "run") == losses(root / "two")
    assert_same(arrays(tmp_path / "run", STEPS), arrays(root / "two", STEPS))


def test_a_process_that_never_starts_is_named(folder, tmp_path):
    run = options(folder, tmp_path / "run")
    port = free_port()
    there = [start(run, (port, 3, index, "--join_seconds=8")) for index in (0, 2)]
    begun = time.monotonic()
    codes, said = ended(there)
    assert codes == [2, 2]
    for words in said:
        assert "1 of 3 processes did not come" in words
        assert "process 1 absent" in words
    assert time.monotonic() - begun < 60
    assert not (tmp_path / "run").exists()


def test_a_process_that_starts_late_says_that_it_is_alone(folder, tmp_path):
    late = start(options(folder, tmp_path / "run"), (free_port(), 2, 1, "--join_seconds=2"))
    (code,), (said,) = ended([late])
    assert code == 2
    assert "Process 1 (" in said
    assert "cannot reach process 0 at 127.0.0.1:" in said


def test_a_process_with_another_config_is_named(folder, tmp_path):
    port = free_port()
    pair = [
        start(options(folder, tmp_path / "run", model__d_ff=d_ff), (port, 2, index))
        for index, d_ff in enumerate((32, 48))
    ]
    codes, said = ended(pair)
    assert codes == [2, 2]
    for words in said:
        assert "Process 1 (" in words
        assert "has config.model.d_ff = 48, process 0 has 32" in words


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_is_named_and_ends_the_other(folder, tmp_path, victim):
    port = free_port()
    run = options(folder, tmp_path / "run", train__steps=100_000)
    pair = [start(run, (port, 2, index)) for index in range(2)]
    log = tmp_path / "run" / "metrics.jsonl"
    try:
        while not log.exists() or len(log.read_text().splitlines()) < 6:
            assert not any(process.poll() for process in pair), ended(pair)
            time.sleep(0.01)
        pair[victim].kill()
        begun = time.monotonic()
        codes, said = ended(pair)
    finally:
        for process in pair:
            process.kill()
    assert time.monotonic() - begun < 30
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] not in (0, -signal.SIGKILL)
    assert f"error: Process {victim} (" in said[1 - victim]
    assert "has ended before its time" in said[1 - victim]


def test_a_signal_to_one_process_saves_on_all(folder, tmp_path):
    port = free_port()
    run = options(folder, tmp_path / "run", train__steps=100_000, train__checkpoint_every=10_000)
    pair = [start(run, (port, 2, index)) for index in range(2)]
    log = tmp_path / "run" / "metrics.jsonl"
    try:
        while not log.exists() or len(log.read_text().splitlines()) < 6:
            assert not any(process.poll() for process in pair), ended(pair)
            time.sleep(0.01)
        pair[1].send_signal(signal.SIGTERM)
        codes, said = ended(pair)
    finally:
        for process in pair:
            process.kill()
    assert codes == [0, 0], said
    (step,) = os.listdir(tmp_path / "run" / "checkpoints")
    assert f"Stopped at step {step}" in said[0]
    assert losses(tmp_path / "run")[-1][0] == int(step)
