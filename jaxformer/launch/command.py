"""`jaxformer launch`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jaxformer import writing
from jaxformer.errors import UserError
from jaxformer.launch import local
from jaxformer.launch.job import Job
from jaxformer.launch.rehearse import rehearse
from jaxformer.launch.render import KINDS, render


def launch(arguments: argparse.Namespace) -> None:
    """Starts processes here, or writes a launch file.

    Raises:
      UserError: no job and no flags are given; or the job cannot be used.
    """
    job = Job.read(arguments.job) if arguments.job else None
    flags = [*(job.train_flags if job else ()), *arguments.flags]
    if not flags:
        raise UserError("What shall run? Give --job FILE.toml, or the flags of train.py after --.")
    if arguments.render:
        if job is None:
            raise UserError(f"--render {arguments.render} needs --job FILE.toml.")
        _write(job, arguments)
    elif arguments.rehearse:
        processes = arguments.rehearse
        devices = arguments.devices or (job.devices if job else processes)
        sys.exit(rehearse(flags, processes, devices))
    else:
        devices = arguments.devices
        environment = {"JAX_NUM_CPU_DEVICES": str(devices)} if devices else {}
        sys.exit(local.run(flags, arguments.local, environment))


def _write(job: Job, arguments: argparse.Namespace) -> None:
    kind = KINDS[arguments.render]
    path = arguments.output or Path(job.name + kind.suffix)
    text = render(job, arguments.render)
    with writing.whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"{path} starts {job.processes} processes: {kind.hand_in.format(file=path)}")
