"""`jaxformer plan`: parsing, the page, the search; on the CPU, and ahead of time where possible."""

import dataclasses
import importlib.util
import io
import re
from argparse import Namespace

import pytest
from rich.console import Console

from jaxformer.cli import main
from jaxformer.config import Config, MeshConfig
from jaxformer.errors import UserError
from jaxformer.hardware import CHIPS
from jaxformer.plan import command, search, target, worker
from jaxformer.plan.estimate import _way, estimate
from jaxformer.plan.hlo import Collective, Counts
from jaxformer.training.flops import step_flops

TINY = [
    "--config.model.d_model=16", "--config.model.num_heads=4", "--config.model.d_ff=24",
    "--config.model.encoder_layers=1", "--config.model.decoder_layers=1",
    "--config.data.vocab_size=64", "--config.data.target_length=16",
    "--config.data.tokens_per_batch=128",
]  # fmt: skip
HAS_TPU = importlib.util.find_spec("libtpu") is not None


def page(topology: str, *overrides: str, mesh: str | None = None) -> tuple[bool, str]:
    console = Console(width=120, record=True, quiet=False, file=io.StringIO())
    arguments = Namespace(config="configs/wmt.py:base", topology=topology, mesh=mesh, limit=240.0)
    fits = command.plan(arguments, [*TINY, *overrides], console)
    return fits, console.export_text()


def test_a_step_on_eight_devices_of_this_machine_on_one_page():
    fits, text = page("cpu:8", mesh="data=2,fsdp=2,tensor=2")
    assert fits
    for words in ("8 devices, mesh data=2,fsdp=2,tensor=2", "parameters", "optimizer",
                  "activations", "temporaries", "matrix products", "memory traffic",
                  "all-gather, host", "all-reduce, host", "target positions/s", "chip-hours",
                  "It fits"):  # fmt: skip
        assert words in text, words
    assert text.count("estimate") >= 2


def test_shares_and_operations_are_those_of_the_formulas():
    config = command.load("configs/wmt.py:base", TINY)
    for mesh, ways in ((MeshConfig(8, 1, 1, 1), 1), (MeshConfig(1, 8, 1, 1), 8)):
        spread = dataclasses.replace(config, mesh=mesh)
        compiled = worker.compile_step(spread, target.parse("cpu:8"), 240)
        D, F, V = 16, 24, 64
        attention, norm = 4 * (D * D + D), 2 * D
        matrices = 3 * 4 * D * D + 2 * 2 * D * F + V * D
        whole = 3 * attention + 2 * (2 * D * F + F + D) + 5 * norm + V * D
        wanted = 4 * (matrices / ways + whole - matrices)
        assert compiled.parameters == wanted
        assert compiled.optimizer == 2 * wanted + 2 * 4  # two moments and two counters
        assert compiled.batch == 7 * 128 * 4 / 8
        exact = step_flops(config.model, V, 8, 16, 16) / 8
        assert compiled.counts.flops == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(
    ("text", "devices", "chips"),
    [("cpu:8", 8, 8), ("cpu:2", 2, 2)]
    + ([("v5p:2x2x4", 16, 16), ("tpu7x:2x2x1", 8, 4), ("16*v5e:16x16", 4096, 4096)] * HAS_TPU),
)
def test_a_topology_has_so_many_devices(text, devices, chips):
    parsed = target.parse(text)
    assert (parsed.devices, parsed.chips) == (devices, chips)


@pytest.mark.parametrize("text", ["v9:2x2", "v5p", "v5p:2by2", "", "v5p:2x2", "cpu:2x2", "2*cpu:8"])
def test_a_topology_that_is_none_is_refused_with_an_example(text):
    with pytest.raises(UserError, match=r"--topology .* (is not known; write|write it as) "):
        target.parse(text)


@pytest.mark.parametrize(("topology", "extra"), [("v5p:2x2x1", "aot-tpu"), ("h100:1x8", "aot-gpu")])
def test_a_compiler_that_is_not_installed_is_named(monkeypatch, capsys, topology, extra):
    monkeypatch.setattr(target, "_installed", lambda module: False)
    with pytest.raises(SystemExit) as end:
        main(["plan", "--config=configs/wmt.py:base", "--topology", topology])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"pip install 'jaxformer[{extra}]'" in said


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ("data=3", "does not fit 8 devices.*take data=8"),
        ("pipeline=8", "'pipeline=8' is no axis"),
        ("data=x", "'data=x' is no axis"),
        ("data=-1,fsdp=-1", "only one axis"),
        ("tensor=8", "tensor=8 does not divide config.model.num_heads=4; take data=2,tensor=4"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_before_anything_is_compiled(monkeypatch, mesh, words):
    monkeypatch.setattr(command, "compile_step", None)
    with pytest.raises(UserError, match=words):
        page("cpu:8", mesh=mesh)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--config.model.d_modle=4"], "did you mean.*d_model"),
        (["--nonsense"], "--nonsense is not known"),
    ],
)
def test_a_wrong_flag_is_one_sentence(overrides, words):
    with pytest.raises(UserError, match=words):
        command.load("configs/wmt.py:base", overrides)


def test_a_compiler_that_takes_too_long_is_stopped():
    config = command.load("configs/wmt.py:base", TINY)
    with pytest.raises(UserError, match=r"needed more than 0 s; raise --limit"):
        worker.compile_step(config, target.parse("cpu:8"), 0.01)


def compiled(counts: Counts, **changes) -> worker.Compiled:
    given = {
        "mesh": {"data": 8, "fsdp": 1, "tensor": 1, "context": 1}, "parameters": 1e9,
        "optimizer": 2e9, "batch": 0.0, "activations": 1e9, "temporaries": 0.0, "needed": 4e9,
        "compiled": True, "seconds": 1.0, "counts": counts,
        "places": [(0, x, y, 0) for y in range(2) for x in range(4)],
    }  # fmt: skip
    return worker.Compiled(**(given | changes))


def test_the_roofline_takes_the_slower_of_both_for_each_operation():
    v5e = target.Target("v5e:4x2", CHIPS["v5e"], "tpu", (4, 2))
    counts = Counts(
        197e9 + 1, 819e6 * 3, [(197e9, 819e6), (1.0, 819e6 * 2)],
        [Collective("all-reduce", 2e8, (0, 1, 2, 3), "f32[1]", 3)],
    )  # fmt: skip
    told = estimate(compiled(counts), Config(), v5e)
    assert told.products == pytest.approx(1e-3)
    assert told.memory == pytest.approx(3e-3)
    assert told.chip == pytest.approx(3e-3)
    assert told.links == pytest.approx(6e-3)
    assert (told.step, told.overlapped) == (pytest.approx(9e-3), pytest.approx(6e-3))
    assert told.bound == "links"


@pytest.mark.parametrize(
    ("members", "way", "rate"),
    [
        ([(0, 0, 0, 0), (0, 1, 0, 0)], "1 torus axis", 100e9),
        ([(0, 0, 0, 0), (0, 1, 1, 0)], "2 torus axes", 200e9),
        ([(0, 0, 0, 0), (1, 0, 0, 0)], "network", 3.1e9),
        ([], "network", 3.1e9),
    ],
)
def test_what_connects_devices_decides_the_rate(members, way, rate):
    v5e = target.Target("2*v5e:2x4", CHIPS["v5e"], "tpu", (2, 4), 2)
    assert _way(members, v5e) == (way, rate)


def test_the_cheapest_change_that_fits_is_the_fastest_of_those(monkeypatch):
    v5e = target.Target("h100:1x8", CHIPS["h100"], "cuda", (1, 8))
    needs = {"accumulate=2": 90e9, "accumulate=4": 70e9, "remat": 60e9, "fsdp": 70e9}
    times = {"accumulate=4": 3e12, "remat": 4e12, "fsdp": 2e12}

    def fake(config, target, limit):
        name = (
            "remat" if config.model.remat
            else "fsdp" if config.mesh.fsdp > 1
            else f"accumulate={config.optimizer.accumulate}"
        )  # fmt: skip
        flops = times.get(name, 1e12)
        return compiled(Counts(flops, 1.0, [(flops, 1.0)]), needed=needs[name])

    monkeypatch.setattr(search, "compile_step", fake)
    config = command.load("configs/wmt.py:base", ["--config.data.tokens_per_batch=65536"])
    shape = {"data": 8, "fsdp": 1, "tensor": 1, "context": 1}
    best, tried = search.cheapest(config, v5e, shape, 1.0, lambda text: None)
    assert best is not None
    assert best.change.flags == "--mesh fsdp=8"
    flags = [t.change.flags for t in tried]
    assert len(flags) == 4
    assert not any(f.count("--") > 1 for f in flags)


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        ("Ran out of memory in memory space hbm. Used 28.50G of 15.75G hbm.", 28.5 * 2**30),
        ("memory required for HLO temporaries (25.06G) exceeds", 25.06 * 2**30),
        ("an unknown op", None),
    ],
)
def test_what_the_compiler_says_of_memory_is_understood(words, needed):
    assert worker._said_to_need(words) == needed


@pytest.mark.skipif(not HAS_TPU, reason="pip install 'jaxformer[aot-tpu]' brings libtpu")
def test_a_step_ahead_of_time_for_a_tpu_that_is_not_here():
    fits, text = page("v5e:2x2", mesh="data=2,fsdp=2")
    assert fits
    assert re.search(r"v5e:2x2: 4 chips, 4 devices, mesh data=2,fsdp=2", text)
    assert re.search(r"all-reduce, \d torus ax", text)
