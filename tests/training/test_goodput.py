"""Every second of a run has a name, over restarts too."""

import contextlib

import pytest

from jaxformer.training import goodput
from jaxformer.training.goodput import KINDS, Goodput, told


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_what_no_kind_takes_belongs_to_the_steps(clock):
    spent = Goodput({}, 0.0, again=False)
    with spent.spend("setup"):
        clock(3)
    clock(5)
    with spent.spend("input"):
        clock(1)
    clock(2)
    seconds = spent.seconds()
    assert seconds == dict.fromkeys(KINDS, 0.0) | {"setup": 3.0, "step": 7.0, "input": 1.0}
    assert "steps 63.64%" in told(seconds)
    assert "waiting for input 9.09%" in told(seconds)


def test_a_restart_costs_its_beginning_and_what_is_done_again(clock):
    spent = Goodput({"step": 10.0, "compile": 2.0}, 4.0, again=True)
    for kind in ("setup", "compile", "checkpoint"):
        with spent.spend(kind):
            clock(1)
    seconds = spent.seconds()
    assert seconds["restarts"] == 6.0
    assert (seconds["step"], seconds["compile"], seconds["checkpoint"]) == (10.0, 2.0, 1.0)


def test_time_counts_where_an_error_ends_the_block(clock):
    spent = Goodput({}, 0.0, again=False)
    with contextlib.suppress(KeyError), spent.spend("evaluation"):
        clock(1)
        raise KeyError
    assert spent.seconds()["evaluation"] == 1.0
