"""The loop around the step: what it writes, when it stops, and what it refuses."""

import io
import json
import os
import signal
import struct
import subprocess

import jax
import numpy as np
import pytest
from rich.console import Console
from run_cases import small, write_text
from tensorboardX.proto.event_pb2 import Event

from jaxformer.checkpoint import Checkpoints
from jaxformer.config import Config
from jaxformer.errors import UserError
from jaxformer.inference.translator import Translator
from jaxformer.training import checks, loop, watch
from jaxformer.training.record import Display

pytestmark = pytest.mark.xdist_group("loop")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    write_text(path)
    return path


def run(values, workdir):
    """(whether the last step was reached, what was printed)"""
    file = io.StringIO()
    finished = loop.run(values, workdir, Console(file=file, width=200))
    return finished, file.getvalue()


def log(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    reached, text = run(small(folder, profile=True, train__steps=16), workdir)
    assert reached
    return workdir, text


def test_a_peak_that_a_step_has_beaten_is_measured_again_and_no_other(
    folder, tmp_path, monkeypatch
):
    peaks = iter([1.0, 1e15])
    monkeypatch.setattr(watch.flops, "matmul_peak", lambda dtype: next(peaks))
    values = small(folder, train__steps=6, train__eval_every=2, train__log_every=2)
    assert loop.train(values, tmp_path, Console(file=io.StringIO()))
    shares = [r["share_of_peak"] for r in log(tmp_path) if "share_of_peak" in r]
    assert shares[0] > 1 > max(shares[1:])


def test_a_run_says_what_it_does_and_leaves_everything(finished):
    workdir, text = finished
    for part in (
        "M parameters",
        "sentence pairs",
        "Compiled the step",
        "step 16/16",
        "report.html",
    ):
        assert part in text, part
    left = {path.name for path in workdir.iterdir()}
    assert left == {
        *("checkpoints", "config.json", "metrics.jsonl", "tensorboard", "profile"),
        *("evaluation.test.json", "report.html"),
    }
    assert Config.of(json.loads((workdir / "config.json").read_text())).train.steps == 16
    assert [r["step"] for r in log(workdir) if "loss" in r] == list(range(1, 17))
    assert [r["step"] for r in log(workdir) if "valid_nll" in r] == [4, 8, 12, 16]
    assert list((workdir / "profile").rglob("*.xplane.pb"))


def test_tensorboard_holds_the_same_numbers(finished):
    workdir, _ = finished
    (path,) = (workdir / "tensorboard").iterdir()
    data, place, events = path.read_bytes(), 0, []
    while place < len(data):  # TFRecord: length, its checksum, the record, its checksum
        (length,) = struct.unpack_from("<Q", data, place)
        events.append(Event.FromString(data[place + 12 : place + 12 + length]))
        place += 16 + length
    shown = {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}
    wanted = {(r["step"], n): v for r in log(workdir) for n, v in r.items() if n != "step"}
    assert shown.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(shown[name], value, rtol=1e-6)


def test_a_finished_run_is_not_scored_again(finished, folder, monkeypatch):
    workdir, _ = finished
    monkeypatch.setattr(Translator, "translate", None)
    before = (workdir / "evaluation.test.json").read_bytes()
    (workdir / "report.html").unlink()
    reached, text = run(small(folder, profile=True, train__steps=16), workdir)
    assert reached
    assert "nothing left to do" in text
    assert (workdir / "evaluation.test.json").read_bytes() == before
    assert (workdir / "report.html").exists()


def test_ctrl_c_saves_and_ends_the_run(folder, tmp_path, monkeypatch):
    update = Display.update

    def interrupt(display, step, *numbers):
        update(display, step, *numbers)
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Display, "update", interrupt)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    reached, text = run(small(folder, train__steps=50), tmp_path)
    assert not reached
    (step,) = (s for s in Checkpoints(tmp_path, keep=5).steps() if s > 4)
    assert step in (6, 7)  # the step under way when the numbers of step 5 were read, or the next
    assert f"Stopped at step {step}" in text
    assert log(tmp_path)[-1]["step"] == step
    assert not (tmp_path / "report.html").exists()
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_updates_that_stay_infinite_end_the_run(folder, tmp_path):
    values = small(folder, train__steps=50, train__max_nonfinite=3)
    values.optimizer.update(learning_rate=1e35, warmup_steps=1, clip_norm=0.0)
    with pytest.raises(UserError) as caught:
        run(values, tmp_path)
    words = str(caught.value)
    skipped = [int(record["skipped"]) for record in log(tmp_path) if "skipped" in record]
    assert skipped[-1] == 2  # the third ends the run
    step = log(tmp_path)[-1]["step"] + 1
    assert f"stopped at step {step}: 3 updates in a row" in words
    # The ids are those of the batch of that step.
    data = loop.pipeline.prepare(Config.of(values)).train
    ids = [str(pair) for row in data.example_ids_at(step - 1) for pair in row]
    assert f"training pairs {', '.join(ids)}." in words


def test_a_full_disk_ends_the_run_and_keeps_the_step_before(folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        values = small(folder, train__steps=40, model__d_model=32)
        with pytest.raises(UserError, match="disk"):
            run(values, disk / "run")
        kept = Checkpoints(disk / "run", keep=5)
        assert kept.steps()[-1] == kept.meta()["step"] < 40
        kept.close()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


META = {"config": json.loads(Config().to_json()), "data_fingerprint": "abc"}


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("model", "d_ff", 64), ("optimizer", "beta1", 0.5), ("data", "vocab_size", 99)],
)
def test_a_run_does_not_go_on_as_another_one(tmp_path, section, field, value):
    values = json.loads(Config().to_json())
    values[section][field] = value
    with pytest.raises(UserError, match=rf"another config\.{section}\.{field}: put it back"):
        checks.check_same_run(Config.of(values), "abc", META, tmp_path)


def test_a_run_goes_on_with_its_own_data_and_seed_only(tmp_path):
    values = json.loads(Config().to_json())
    values["train"]["steps"], values["mesh"]["fsdp"], values["data"]["workers"] = 5, 2, 3
    checks.check_same_run(Config.of(values), "abc", META, tmp_path)
    with pytest.raises(UserError, match="trained on other data"):
        checks.check_same_run(Config.of(values), "abd", META, tmp_path)
    with pytest.raises(UserError, match=r"another config\.seed"):
        checks.check_same_run(Config.of(values | {"seed": 1}), "abc", META, tmp_path)


def test_a_batch_smaller_than_the_mesh_is_refused_before_anything_is_written(folder, tmp_path):
    assert jax.device_count() == 8
    with pytest.raises(UserError, match=r"mesh"):
        run(small(folder, data__tokens_per_batch=64), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_made_is_one_sentence(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        run(small(folder), tmp_path / "file" / "run")
