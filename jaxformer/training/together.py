"""`train.py` as one process of several: find the others, train with them, score alone."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import jaxformer
from jaxformer import processes
from jaxformer.config import Config
from jaxformer.training import loop

MAY_DIFFER = ("data_dir", "workers")
"""Fields of config.data that each host may have its own way."""


def run(
    values: Mapping[str, Any],
    workdir: str,
    place: processes.Place | None,
    join_seconds: float,
    lost_seconds: int,
) -> None:
    """`training.loop.run`, by all processes of the job together.

    Raises:
      UserError: as `loop.run`; or a process is absent or different.
    """
    if place is None:
        loop.run(values, workdir)
        return
    prints = fingerprints(Config.of(values)) | {"--workdir": workdir}
    with processes.joined(place, prints, join_seconds, lost_seconds):
        finished = loop.train(values, workdir, loop.stderr())
    if finished and place.index == 0:
        # JAX cannot go back to being one process; a fresh program can.
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, "-m", "jaxformer.report", workdir])


def fingerprints(config: Config) -> dict[str, str]:
    """What all processes must have in common before they compute together."""
    fields = {}
    for section, part in dataclasses.asdict(config).items():
        names = part if isinstance(part, dict) else {"": part}
        for name, value in names.items():
            if name not in MAY_DIFFER:
                fields[".".join(filter(None, ("config", section, name)))] = repr(value)
    return {"the code of jaxformer": _code()[:12], "JAX": jax.__version__, **fields}


def _code() -> str:
    """SHA-256 over every module of jaxformer."""
    root = Path(jaxformer.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
