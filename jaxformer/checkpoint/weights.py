"""Reading weights alone, for those who translate."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxformer import processes
from jaxformer.checkpoint.files import META, read_json, sound_steps
from jaxformer.checkpoint.run import WEIGHTS
from jaxformer.errors import UserError

log = logging.getLogger(__name__)


def load_weights(
    workdir: str | Path, step: int | None = None, average: int = 1
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights to translate with: the moving average if the run kept one, else the parameters.

    Reads neither optimizer state nor the mesh that wrote it; changes nothing in `workdir`.

    Args:
      workdir: the directory of a run, which may be training at this moment.
      step: None takes the newest undamaged one, with a warning if that is not the newest.
      average: uniform mean, in float64, over so many steps up to this one.

    Returns:
      A nested dict of NumPy arrays in the dtypes of training, and the meta of the newest step read.

    Raises:
      UserError: no such step, it is damaged, or there are fewer than `average`.
    """

    def choose() -> list[int]:
        chosen, damaged = sound_steps(workdir, step, average, WEIGHTS)
        for path, reason in damaged.items():
            log.warning("%s is damaged (%s): step %d is used.", path, reason, chosen[0])
        return chosen

    if average < 1:
        raise UserError(f"average={average} checkpoints cannot be averaged; ask for 1 or more.")
    newest, *others = (Path(workdir) / "checkpoints" / str(n) for n in processes.shared(choose))
    weights = _load_weights(newest)
    if others:
        sums = jax.tree.map(lambda w: w.astype(np.float64), weights)
        for path in others:
            sums = jax.tree.map(lambda s, w: s + w.astype(np.float64), sums, _load_weights(path))
        weights = jax.tree.map(lambda s, w: (s / average).astype(w.dtype), sums, weights)
    return weights, read_json(newest / META)


def _load_weights(path: Path) -> dict[str, Any]:
    stored = ocp.checkpointables_metadata(path.absolute()).metadata
    name = "ema" if "ema" in stored else "params"
    # A NumPy target asks for NumPy arrays; this one is a view of a single element.
    target = jax.tree.map(lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape), stored[name])
    return ocp.load_checkpointables(path.absolute(), {name: target})[name]
