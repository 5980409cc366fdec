"""A job as the file that a scheduler takes."""

from __future__ import annotations

import json
import math
import shlex
from importlib import resources
from typing import NamedTuple

import jinja2

from jaxformer.errors import UserError
from jaxformer.launch.job import Job


class Kind(NamedTuple):
    """A scheduler: how its file ends, how it is handed in, and what the job must name."""

    suffix: str
    hand_in: str
    needs: tuple[str, ...]


KINDS = {
    "slurm": Kind(".sbatch", "sbatch {file}", ()),
    "jobset": Kind(".yaml", "kubectl apply -f {file}", ("image",)),
    "tpu-vm": Kind(".sh", "bash {file}", ("tpu", "zone")),
    "xpk": Kind(".sh", "bash {file}", ("image", "tpu", "zone", "cluster")),
}


GKE_TPU = {
    "v4": "tpu-v4-podslice",
    "v5litepod": "tpu-v5-lite-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
"""What Kubernetes on Google Cloud calls the generations."""


def render(job: Job, kind: str) -> str:
    """The text of the launch file.

    Raises:
      UserError: the job lacks a field that this scheduler needs.
    """
    for field in KINDS[kind].needs:
        if not getattr(job, field):
            raise UserError(f"--render {kind} needs {field} in the job description.")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"sh": shlex.quote, "yaml": json.dumps}
    template = resources.files("jaxformer.launch").joinpath(f"{kind}.jinja").read_text("utf-8")
    minutes = math.ceil(job.hours * 60)
    return environment.from_string(template).render(
        job=job,
        accelerator=GKE_TPU.get(job.tpu.partition("-")[0], job.tpu),
        time=f"{minutes // 60:02}:{minutes % 60:02}:00",
        command=shlex.join([job.python, "train.py", *job.train_flags]),
    )
