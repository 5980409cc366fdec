"""Trains a Transformer: python train.py --config=configs/zh_en.py:laptop --workdir=runs/laptop

On many hosts the same command runs once for each process; `jaxformer launch` starts them.
"""

import sys

from absl import flags
from ml_collections import config_flags

from jaxformer import processes
from jaxformer.command_line import parse_flags
from jaxformer.errors import plainly_said
from jaxformer.training import together

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/ and its preset; --config.FIELD=VALUE changes a field."
)
WORKDIR = flags.DEFINE_string("workdir", None, "The directory that keeps everything of the run.")
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0; SLURM, MPI, Kubernetes and TPU pods need none."
)
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes train together.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
JOIN_SECONDS = flags.DEFINE_float("join_seconds", 300.0, "By then all processes must be there.")
LOST_SECONDS = flags.DEFINE_integer("lost_seconds", 60, "A host silent for so long counts as dead.")


def main() -> None:
    """Flags to `training.together.run`."""
    with plainly_said():
        flags.mark_flags_as_required(["config", "workdir"])
        parse_flags(sys.argv)
        place = processes.find_place(COORDINATOR.value, PROCESSES.value, PROCESS_ID.value)
        workdir = WORKDIR.value or ""
        together.run(CONFIG.value, workdir, place, JOIN_SECONDS.value, LOST_SECONDS.value)


if __name__ == "__main__":
    main()
