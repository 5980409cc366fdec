"""Draws the curve of a run for the README, as its report does.

python docs/pictures.py runs/laptop docs/images/curve.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from jaxformer import report
from jaxformer.errors import plainly_said
from jaxformer.metrics import read_log

if __name__ == "__main__":
    with plainly_said():
        workdir, path = sys.argv[1:]
        report.curves(read_log(Path(workdir))).savefig(path, dpi=120)
        print(f"wrote {path}")
