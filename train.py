"""Trains a Transformer: python train.py --config=configs/zh_en.py:laptop --workdir=runs/laptop"""

from absl import app, flags
from ml_collections import config_flags

from jaxformer.training import loop

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, and its preset.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps everything it writes.")


def main(argv):
    loop.run(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
