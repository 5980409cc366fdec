"""Which process this is, by flags and by schedulers, and what is said of one that differs."""

import subprocess
import sys

import pytest
from process_cases import ROOT

from jaxformer import processes
from jaxformer.errors import UserError
from jaxformer.processes.roll import _difference


def test_flags_say_which_process_this_is():
    assert processes.find_place("host:80", 2, 1) == processes.Place("host:80", 2, 1)
    assert processes.find_place("host:80", 1, 0) is None
    for given in (("host:80", 2, None), (None, None, 0)):
        with pytest.raises(UserError, match="must be given too"):
            processes.find_place(*given)
    with pytest.raises(UserError, match="from 0 to 1"):
        processes.find_place("host:80", 2, 2)
    with pytest.raises(UserError, match="host and port"):
        processes.find_place("host", 2, 1)


SCHEDULERS = {
    "slurm": {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[3-4]",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
    },
    "open mpi": {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    },
}


@pytest.mark.parametrize(("scheduler", "host"), [("slurm", "node3"), ("open mpi", "10.96.0.1")])
def test_schedulers_say_which_process_this_is(monkeypatch, scheduler, host):
    for name, value in SCHEDULERS[scheduler].items():
        monkeypatch.setenv(name, value)
    place = processes.find_place(None, None, None)
    assert (place.count, place.index) == (4, 3)
    assert place.coordinator.rpartition(":")[0] == host


def test_the_first_difference_is_named():
    def said(**prints):
        return {"host": "b", "prints": prints}

    assert _difference({0: said(code="1", jax="2"), 1: said(code="1", jax="2")}) == ""
    words = _difference({0: said(code="1"), 1: said(code="1"), 2: said(code="3")})
    assert words.startswith("Process 2 (b) has code = 3, process 0 has 1;")
    assert "has code = nothing" in _difference({0: said(code="1"), 1: said()})


def test_alone_everything_is_shared_already():
    assert (processes.index(), processes.count()) == (0, 1)
    assert processes.shared(lambda: [3]) == [3]
    processes.check_same("data", "abc")


def test_a_save_that_takes_too_long_ends_the_process():
    code = (
        "import time\nfrom jaxformer.training.stopping import time_limit\n"
        "with time_limit(5): pass\n"
        "with time_limit(1): time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "not on disk 1 s after the signal to stop" in done.stderr
