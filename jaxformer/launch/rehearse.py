"""A job on this machine's CPU before it costs anything: the same processes, a model shrunk to fit.

All but the sizes is the job's own: flags, config, mesh, data, roll call, checkpoints, scores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from jaxformer.command_line import load_config
from jaxformer.config import Config
from jaxformer.errors import UserError
from jaxformer.launch import local

STEPS = 6
ROW = 64  # target positions of a row


def rehearse(flags: Sequence[str], processes: int, devices: int) -> int:
    """Runs `train.py` with these flags in `processes` local processes, with the sizes of `shrunk`.

    Args:
      flags: of the job, --config among them; its --workdir is left alone.
      processes: how many, each with an equal part of the devices.
      devices: virtual CPU devices of all processes together: as many as the mesh needs.

    Returns:
      The exit code: 0 if the job would start, train, save and score.

    Raises:
      UserError: the devices cannot be dealt out; or no --config.
    """
    if devices % processes:
        raise UserError(f"{devices} devices cannot be dealt out evenly to {processes} processes.")
    names = [flag.partition("=")[2] for flag in flags if flag.startswith("--config=")]
    if not names:
        raise UserError("A rehearsal needs the job's --config=FILE.")
    overrides = [flag for flag in flags if flag.startswith("--config.")]
    small = shrunk(Config.of(load_config(names[-1], overrides)), devices)
    with tempfile.TemporaryDirectory() as folder:
        kept = [flag for flag in flags if not flag.startswith("--workdir")]
        environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices // processes)}
        return local.run([*kept, *small, f"--workdir={folder}"], processes, environment)


def shrunk(config: Config, devices: int) -> list[str]:
    """The flags that make a config small and leave everything else of it as it is.

    Heads, vocabulary and the kinds of layers stay, because the mesh must still be able to cut them.
    """
    model, optimizer = config.model, config.optimizer
    unit = model.num_heads * 8
    sizes: dict[str, Any] = {
        "model.d_model": unit,
        "model.head_dim": 8,
        "model.d_ff": 2 * unit,
        "model.encoder_layers": 1,
        "model.decoder_layers": 1,
        "data.target_length": min(config.data.target_length, ROW),
        "data.source_length": 0,
        "data.tokens_per_batch": min(config.data.target_length, ROW)
        * devices
        * optimizer.accumulate,
        "optimizer.warmup_steps": 2,
        "train.steps": STEPS,
        "train.eval_every": STEPS // 2,
        "train.eval_batches": 1,
        "train.checkpoint_every": STEPS // 2,
        "train.log_every": 1,
        "decode.beam": 1,
        "decode.max_length": 8,
    }
    return [f"--config.{name}={value}" for name, value in sizes.items()]
