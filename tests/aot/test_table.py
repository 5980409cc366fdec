"""The table of estimates: what is shown, and what is not compiled again."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console

from benchmarks import ahead, attention


@pytest.fixture(autouse=True)
def _versions(monkeypatch):
    monkeypatch.setattr(attention, "versions", lambda: "jax 1, libtpu 2")
    attention.fingerprint.cache_clear()
    yield
    attention.fingerprint.cache_clear()


def measured(case: ahead.Case, limit: float) -> ahead.Result:
    if case.kernel == "library":
        return ahead.Result(refused="the library aborts")
    # 1,500 cycles of v5e are a microsecond, and so are 819,000 bytes; the last has no cycles.
    operations = [("flash", 3000.0, 1e6, 0.0), ("copy", 10.0, 0.0, 819e3)]
    if case.kernel == "xla":
        operations.append(("fusion", 0.0, 197e6, 0.0))
    return ahead.Result(operations=operations)


def test_a_run_goes_on_where_it_was_stopped_and_the_table_tells_all(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "measure", lambda *a: asked.append(a[0]) or measured(*a))
    path = tmp_path / "results.jsonl"
    wanted = attention.cases(["v5e"], [512], [64], ["causal"], short=False)
    attention.fill(wanted[:2], path, 1, 1)
    found = attention.fill(wanted, path, 1, 1)
    assert sorted(asked, key=str) == sorted(wanted, key=str)
    assert len(path.read_text().splitlines()) == len(wanted) == 6

    shown, reasons = attention.table(wanted, found)
    text = io.StringIO()
    Console(file=text, width=200).print(shown)
    row = next(line for line in text.getvalue().splitlines() if "forward" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    flops = 2 * 2 * 4 * 64 * 512 * 513 / 2
    assert cells == [
        "v5e", "512", "64", "causal", "forward",
        f"3,010, 3.0, {flops / 3e-6 / 197e12:.0%}",
        f"≥ 3,010, ≥ 4.0, {flops / 4e-6 / 197e12:.0%}",
        "aborts", "0.75", "",
    ]  # fmt: skip
    assert reasons == ["library on v5e: the library aborts"]


def test_estimates_of_another_source_are_old(tmp_path):
    path = tmp_path / "results.jsonl"
    case = dataclasses.asdict(ahead.Case("v5e", "ours"))
    true = {"case": case, "made_of": attention.fingerprint("ours"), "cycles": 1}
    path.write_text(json.dumps(true | {"made_of": "0"}) + "\n", encoding="utf-8")
    assert attention.known(path) == {}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(true) + "\n")
    assert list(attention.known(path).values()) == [json.loads(json.dumps(true))]
