"""Trains a Transformer: python train.py --config=configs/zh_en.py:laptop --workdir=runs/laptop"""

import sys

from absl import flags
from ml_collections import config_flags

from jaxformer.command_line import parse_flags
from jaxformer.errors import plainly_said
from jaxformer.training import loop

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/ and its preset; --config.FIELD=VALUE changes a field."
)
WORKDIR = flags.DEFINE_string("workdir", None, "The directory that keeps everything of the run.")


def main() -> None:
    """Flags to `training.loop.run`."""
    with plainly_said():
        flags.mark_flags_as_required(["config", "workdir"])
        parse_flags(sys.argv)
        loop.run(CONFIG.value, WORKDIR.value or "")


if __name__ == "__main__":
    main()
