"""The short form of benchmarks/kill_matrix.py: ten runs disturbed, none lost."""

import pytest

from benchmarks import kill_job, kill_matrix

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.long]

SHORT = ["at any moment", "during a save", "during a restore", "disk full"]
SHORT += ["bit flipped in the newest checkpoint", "one process of two lost"]


@pytest.mark.timeout(600)
def test_disturbed_runs_end_bit_for_bit_like_undisturbed_ones(tmp_path, monkeypatch):
    kinds = {name: kill_matrix.KINDS[name] for name in SHORT}
    if not kill_job.may_mount():
        kinds.pop("disk full")
    monkeypatch.setattr(kill_matrix, "KINDS", kinds)
    results = list(kill_matrix.matrix(tmp_path, 10, 2, seed=7))
    assert len(results) == 10
    assert {result.processes for result in results} == {1, 2}
    assert [result for result in results if result.trouble or not result.same] == []


def test_the_table_counts_what_was_lost():
    result = kill_matrix.Result("during a save", 2, 4, True, "")
    lines = kill_matrix.table([result, result._replace(same=False, trouble="x")]).splitlines()
    assert "| during a save | 2 | 2 | 1 | 1 |" in lines
    assert lines[-1] == "| **all** | | **2** | **1** | **1** |"
