"""Text of your own: one `source<TAB>target` pair a line.

    python train.py --config=configs/tsv.py --config.data.train=my.tsv --config.data.valid=dev.tsv \
        --config.data.test=test.tsv --workdir=runs/mine

A pair of line-aligned files is given as "a.zh,a.en"; a .jsonl file holds objects with the keys
`config.data.source` and `config.data.target`. Splits that are left empty are left out.
"""

import ml_collections

from configs import zh_en


def get_config() -> ml_collections.ConfigDict:
    """The model and recipe of zh_en:laptop on the files that the command line names."""
    c = zh_en.get_config("laptop")
    c.data.name = "files"
    c.data.update(source="source", target="target", train="", valid="", test="")
    c.model.dropout = 0.1
    return c
