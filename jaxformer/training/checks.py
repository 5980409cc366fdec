"""Whether a run may go on where another left off."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxformer.config import Config
from jaxformer.errors import UserError

FREE_TO_CHANGE = ("train", "decode", "mesh", "profile")
"""What of the config may differ from the run that wrote the checkpoint."""


def check_same_run(config: Config, fingerprint: str, meta: dict[str, Any], workdir: Path) -> None:
    """Refuses to go on with a checkpoint of another model, optimizer or data set.

    Raises:
      UserError: names the first field that differs, or the data.
    """
    here, there = dataclasses.asdict(config), meta["config"]
    for section, values in here.items():
        if section in FREE_TO_CHANGE:
            continue
        differing = (
            [name for name in values if values[name] != there[section].get(name)]
            if isinstance(values, dict)
            else [""] * (values != there[section])
        )
        differing = [
            name for name in differing if name not in ("data_dir", "workers", "context_keys")
        ]
        if differing:
            name = ".".join(filter(None, (section, differing[0])))
            raise UserError(
                f"{workdir} holds a run with another config.{name}: put it back (the run's config "
                f"is in {workdir / 'config.json'}), or choose another --workdir."
            )
    if fingerprint != meta["data_fingerprint"]:
        raise UserError(
            f"{workdir} was trained on other data than config.data now gives; bring the old data "
            "back, or choose another --workdir."
        )
