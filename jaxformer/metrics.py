"""The log of a run: one JSON object a line, in its workdir."""

from __future__ import annotations

import json
from pathlib import Path

LOG = "metrics.jsonl"


def read_log(workdir: Path) -> list[dict[str, float]]:
    """The records of a run, in order; a last line cut short by a crash is left out."""
    path = workdir / LOG
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
