"""The whole system, as the README starts it: a grammar learned, scored and translated from."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.xdist_group("steve")
def test_steve_builds_a_house(tmp_path):
    workdir = tmp_path / "steve"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    start = time.monotonic()
    trained = subprocess.run(
        [
            *(sys.executable, "train.py", "--config=configs/steve.py", f"--workdir={workdir}"),
            f"--config.data.data_dir={tmp_path / 'data'}",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert trained.returncode == 0, trained.stderr
    print(f"trained and scored in {time.monotonic() - start:.0f} s")
    scores = json.loads((workdir / "evaluation.test.json").read_text())
    everything = scores["domains"][-1]
    assert everything["name"] == "all"
    assert everything["pairs"] >= 500
    assert everything["model"]["bleu"] >= 98, scores["domains"]
    assert everything["floor"]["bleu"] < 60
    assert len(scores["samples"]) == 10
    assert all(sample["output"] in trained.stderr for sample in scores["samples"])
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert scores["samples"][0]["source"] in page
    assert "<svg" in page
    translated = subprocess.run(
        [Path(sys.executable).parent / "jaxformer", "translate", "--workdir", workdir],
        input="史蒂夫建造房子\n史蒂夫 建造 房子\n",
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert translated.stdout == "Steve builds a house\nSteve builds a house\n", translated.stderr
    explained = subprocess.run(
        [
            *(Path(sys.executable).parent / "jaxformer", "explain", "--alignments"),
            *("--workdir", workdir, "-o", tmp_path / "alignments.png"),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert explained.returncode == 0, explained.stderr
    assert json.loads(explained.stdout)["aer"] <= 0.10
    assert (tmp_path / "alignments.png").read_bytes().startswith(b"\x89PNG")
