"""train.py as a person starts it: real processes, killed and started again."""

import base64
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from run_cases import flags, small, write_text

from jaxformer.checkpoint import Checkpoints
from jaxformer.config import Config, MeshConfig
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.sharding import make_mesh
from jaxformer.training import state
from jaxformer.training.optimizer import make

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
SPEEDS = ("seconds", "tokens_per_second", "share_of_peak")

pytestmark = pytest.mark.xdist_group("processes")


def command(*arguments):
    return [sys.executable, "train.py", "--config=configs/tsv.py", *arguments]


def numbers(workdir):
    """What a run logged, but for how fast it was."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{name: r[name] for name in r if name not in SPEEDS} for r in records]


def arrays(workdir, values):
    """Every array of the newest checkpoint, optimizer and counters included, as (dtype, bytes)."""
    config = Config.of(values)
    mesh = make_mesh(MeshConfig())
    with contextlib.closing(Checkpoints(workdir, keep=9)) as checkpoints, jax.set_mesh(mesh):
        tokenizer = Tokenizer.from_bytes(base64.b64decode(checkpoints.meta()["tokenizer"]))
        like = state.abstract(config, tokenizer.vocab_size, make(config), mesh)
        named, _ = checkpoints.restore(state.to_named(like))
    leaves, _ = jax.tree_util.tree_flatten_with_path(named)
    return {str(name): (leaf.dtype, np.asarray(leaf).tobytes()) for name, leaf in leaves}


def kill_at(step, number, arguments, workdir):
    """Starts the command, signals it once `step` is logged and one saved; (exit code, stderr)."""
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            log = workdir / "metrics.jsonl"
            saved = (workdir / "checkpoints" / "5").exists()
            if saved and f'{{"step": {step},' in log.read_text():
                process.send_signal(number)
                break
            time.sleep(0.002)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, errors.decode()


def test_killed_and_resumed_is_bitwise_the_same(tmp_path):
    write_text(tmp_path)
    values = small(
        tmp_path,
        model__dropout=0.1,
        model__attention_dropout=0.1,
        optimizer__ema_decay=0.9,
        train__steps=40,
        train__checkpoint_every=5,
        train__eval_every=10,
        train__keep_checkpoints=9,
        data__test="",
        data__target_length=64,
        data__tokens_per_batch=2048,
    )
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    options = flags(values)
    whole = subprocess.run(
        command(*options, f"--workdir={straight}"),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert whole.returncode == 0, whole.stderr
    first, second = random.randint(6, 20), random.randint(24, 34)
    options.append(f"--workdir={broken}")
    code, _ = kill_at(first, signal.SIGKILL, options, broken)
    assert code == -signal.SIGKILL, f"not killed at step {first}"
    code, said = kill_at(second, signal.SIGTERM, options, broken)
    assert code == 0, said
    assert "Going on from step" in said
    assert "the same command goes on" in said, f"not stopped at step {second}"
    last = subprocess.run(
        command(*options), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert last.returncode == 0, last.stderr
    assert numbers(broken) == numbers(straight), (first, second)
    assert [record["step"] for record in numbers(broken) if "loss" in record] == [*range(1, 41)]
    got, wanted = arrays(broken, values), arrays(straight, values)
    assert any("ema" in name for name in wanted)
    assert any("optimizer" in name for name in wanted)
    assert got == wanted, (first, second)


BAD = {
    "a misspelt field": (["--config.model.d_modle=8"], "did you mean 'd_model'"),
    "a wrong type": (["--config.train.steps=many"], "train.steps"),
    "heads that do not divide": (["--config.model.num_heads=3"], "num_heads=3 does not divide"),
    "no such file": (["--config.data.train=gone.tsv"], "gone.tsv"),
    "no workdir": ([], "--workdir"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path, case):
    bad, words = BAD[case]
    write_text(tmp_path)
    options = [*flags(small(tmp_path)), *bad]
    if case != "no workdir":
        options.append(f"--workdir={tmp_path / 'run'}")
    done = subprocess.run(
        command(*options), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert not list((tmp_path / "run").rglob("*.json*"))
