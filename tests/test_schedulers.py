"""The same run under SLURM and Open MPI, two tasks on this machine, as in one process."""

import json
import shutil
import subprocess
import sys

import pytest
from process_cases import ROOT, ended, environment, start
from run_cases import flags, small, write_text
from schedulers import slurm, why_no_slurm

from jaxformer.launch.job import Job
from jaxformer.launch.render import render

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.long]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(flags, losses) of a run in one process."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder)
    options = flags(small(folder, model__dropout=0.1, data__valid="", data__test=""))
    (code,), said = ended([start([*options, f"--workdir={folder / 'one'}"], devices=2)])
    assert code == 0, said
    return options, losses(folder / "one")


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


def test_slurm(alone, tmp_path):
    """By the file that `jaxformer launch --render slurm` writes."""
    if why := why_no_slurm():
        pytest.skip(why)
    options, wanted = alone
    job = Job(
        name="two",
        config="configs/tsv.py",
        workdir=str(tmp_path / "run"),
        flags=tuple(options),
        processes_per_host=2,
        directory=str(ROOT),
        python=sys.executable,
    )
    (tmp_path / "two.sbatch").write_text(render(job, "slurm"))
    (tmp_path / "slurm").mkdir()
    with slurm(tmp_path / "slurm") as found:
        done = subprocess.run(
            ["sbatch", "--wait", "--overcommit", f"--output={tmp_path}/log", "two.sbatch"],
            cwd=tmp_path,
            env=found | {k: v for k, v in environment().items() if k != "PATH"},
            capture_output=True,
            text=True,
            timeout=200,
        )
    log = tmp_path / "log"
    said = log.read_text() if log.exists() else done.stderr
    assert done.returncode == 0, said
    assert "on 2 cpu device(s)" in said
    assert losses(tmp_path / "run") == wanted


def test_open_mpi(alone, tmp_path):
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun: apt-get install openmpi-bin")
    options, wanted = alone
    launch = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    options = ["--config=configs/tsv.py", *options, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [*launch, sys.executable, "train.py", *options],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "on 2 cpu device(s)" in done.stderr
    assert losses(tmp_path / "run") == wanted
