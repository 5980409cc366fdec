"""`jaxformer launch`: processes of this machine, launch files, and the rehearsal of a job."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from process_cases import ROOT, environment
from run_cases import flags, small, write_text

from jaxformer import cli
from jaxformer.config import Config
from jaxformer.errors import UserError
from jaxformer.launch import local
from jaxformer.launch.job import Job
from jaxformer.launch.rehearse import rehearse, shrunk
from jaxformer.launch.render import GKE_TPU, render

pytestmark = pytest.mark.xdist_group("processes")

JOB = ROOT / "docs" / "examples" / "job.toml"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A train.py of three lines in a directory of its own, instead of the real one."""

    def write(text):
        (tmp_path / "train.py").write_text(text)
        monkeypatch.chdir(tmp_path)

    return write


def run(count=2, flags=()):
    out = io.StringIO()
    begun = time.monotonic()
    code = local.run(flags, count, {}, out)
    return code, out.getvalue().splitlines(), time.monotonic() - begun


def test_every_process_gets_its_place_and_its_lines_a_prefix(program):
    program("import sys; print(*sys.argv[1:]); print('to stderr', file=sys.stderr)")
    code, lines, _ = run(3, ["--config=x"])
    assert code == 0
    assert len(lines) == 6
    for index in range(3):
        mine = [line for line in lines if line.startswith(f"[{index}] ")]
        assert f"[{index}] to stderr" in mine
        (place,) = (line for line in mine if "--config=x" in line)
        assert f"--processes=3 --process_id={index}" in place
        assert "--coordinator=127.0.0.1:" in place


def test_all_end_when_one_fails(program, monkeypatch):
    monkeypatch.setattr(local, "OWN_END", 0.2)
    program("import sys, time; sys.exit(7) if '--process_id=1' in sys.argv else time.sleep(600)")
    code, lines, seconds = run()
    assert code == 7
    assert lines[-1] == "Process 1 ended first, with exit code 7; all have ended."
    assert seconds < 60


def test_a_process_that_ignores_sigterm_ends_too(program, monkeypatch):
    monkeypatch.setattr(local, "OWN_END", 1.0)
    monkeypatch.setattr(local, "STOP_END", 0.2)
    program(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if '--process_id=0' in sys.argv: os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(600)"
    )
    code, lines, seconds = run()
    assert code == signal.SIGKILL
    assert "Process 0 ended first, SIGKILL" in lines[-1]
    assert seconds < 60


def test_ctrl_c_is_passed_on_as_sigterm(program):
    program(
        "import signal, sys, time\n"
        "def stop(*_): print('saved', flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    out = io.StringIO()

    def interrupt():
        while out.getvalue().count("ready") < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert local.run([], 2, {}, out) == 0
    assert out.getvalue().count("saved") == 2


def test_without_train_py_it_says_where_to_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no train\.py in this directory"):
        local.run([], 2, {})


def test_slurm_file_is_a_script_with_the_job_in_it(tmp_path):
    text = render(Job.read(JOB), "slurm")
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=48:00:00"):
        assert f"#SBATCH {line}\n" in text
    assert "--config.mesh.fsdp=8" in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize("kind", ["tpu-vm", "xpk"])
def test_shell_scripts_quote_what_they_are_given(kind):
    job = Job(
        name="a b", config="c", workdir="it's", tpu="v5p-32", zone="z", image="i", cluster="k"
    )
    text = render(job, kind)
    tool = "xpk" if kind == "xpk" else "gcloud"
    show = f"{tool}() {{ printf '%s\\n' \"$@\"; }}\n"
    done = subprocess.run(["bash"], input=show + text, capture_output=True, text=True, check=True)
    (command,) = (x for x in done.stdout.splitlines() if x.startswith("--command="))
    inner = "python() { printf '%s\\n' \"$@\"; }\n" + command.removeprefix("--command=").replace(
        job.python, "python"
    )
    words = subprocess.run(["bash"], input=inner, capture_output=True, text=True, check=True).stdout
    assert words.splitlines() == ["train.py", "--config=c", "--workdir=it's"]
    assert "a b" in "".join(done.stdout.splitlines()) or "--workload=a b" in done.stdout


def test_jobset_tells_each_pod_its_place():
    yaml = pytest.importorskip("yaml")
    job = Job.read(JOB)
    loaded = yaml.safe_load(render(job, "jobset"))
    (workers,) = loaded["spec"]["replicatedJobs"]
    spec = workers["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == job.processes == 32
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][1] == "train.py"
    assert "--process_id=$(JOB_COMPLETION_INDEX)" in container["command"]
    assert "--coordinator=wmt-big-workers-0-0.wmt-big:55527" in container["command"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == GKE_TPU["v5p"]


def test_a_launch_file_is_written_where_it_is_said(tmp_path, capsys):
    path = tmp_path / "x.sbatch"
    cli.main(["launch", "--render", "slurm", "--job", str(JOB), "--output", str(path)])
    assert path.read_text().startswith("#!/bin/bash")
    assert f"sbatch {path}" in capsys.readouterr().out


BAD = {
    'name = "x"\nconfig = "c"': "workdir is missing",
    'name = "x"\nconfig = "c"\nworkdir = "w"\nhost = 2': "host is not known; known: hosts",
    'name = "x"\nconfig = "c"\nworkdir = "w"\nhosts = "2"': "hosts is '2'; it must be a int",
    'name = "x"\nconfig = "c"\nworkdir = "w"\nhosts = 0': "hosts is 0; it must be at least 1",
    'name = "x': "is no TOML",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_job_is_one_sentence(tmp_path, text):
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(UserError, match=BAD[text]):
        Job.read(tmp_path / "job.toml")


def test_a_scheduler_says_what_it_misses():
    job = Job(name="x", config="c", workdir="w")
    with pytest.raises(UserError, match="--render jobset needs image"):
        render(job, "jobset")


def test_shrinking_leaves_what_the_mesh_cuts():
    config = Config.of(
        {"model": {"num_heads": 16, "d_model": 1024}, "optimizer": {"accumulate": 2}}
    )
    sizes = dict(flag.removeprefix("--config.").split("=") for flag in shrunk(config, 8))
    assert int(sizes["model.d_model"]) == 128
    rows = int(sizes["data.tokens_per_batch"]) // int(sizes["data.target_length"])
    assert rows == 8 * 2
    assert not {"model.num_heads", "data.vocab_size"} & sizes.keys()


def test_a_rehearsal_knows_what_the_flags_of_the_job_change(monkeypatch):
    started = []
    monkeypatch.setattr(local, "run", lambda flags, *_: started.extend(flags) or 0)
    changes = ["--config.optimizer.accumulate=4", "--config.data.target_length=32"]
    assert rehearse([f"--config={ROOT}/configs/steve.py", *changes], 2, 2) == 0
    sizes = dict(flag.removeprefix("--config.").split("=") for flag in started)
    rows = int(sizes["data.tokens_per_batch"]) // int(sizes["data.target_length"])
    assert rows == 2 * 4  # a row for each micro-batch of each device


def test_a_job_has_as_many_devices_as_its_hosts_bring():
    job = Job(name="x", config="c", workdir="w", hosts=3)
    assert job.devices == 3
    assert dataclasses.replace(job, gpus_per_host=8, processes_per_host=8).devices == 24
    assert dataclasses.replace(job, tpu="v5p-32", tpus_per_host=4).devices == 12


def test_devices_must_go_round():
    with pytest.raises(UserError, match="3 devices cannot be dealt out evenly to 2"):
        rehearse(["--config=configs/steve.py"], 2, 3)


def test_a_rehearsal_runs_the_job_and_leaves_its_workdir_alone(tmp_path):
    write_text(tmp_path)
    options = flags(small(tmp_path, mesh__data=1, mesh__fsdp=2, model__num_heads=2))
    launch = ["-m", "jaxformer.cli", "launch", "--rehearse", "--devices", "2", "--"]
    options = ["--config=configs/tsv.py", *options, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, *launch, *options],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    assert "step 6/6" in done.stdout
    assert "on 2 cpu device(s)" in done.stdout
    assert not (tmp_path / "run").exists()
