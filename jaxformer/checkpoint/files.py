"""The files of a checkpoint: which steps there are, and which are still what was written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from jaxformer.errors import UserError

META, MANIFEST = "meta.json", "manifest.json"
SEAL = "manifest.sha256"  # as sha256sum writes it: `sha256sum -c` in the step's directory checks it


def complete_steps(directory: Path) -> list[int]:
    """The steps whose directory has its final name, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def sound_steps(
    workdir: str | Path, step: int | None, count: int, trees: tuple[str, ...] | None = None
) -> tuple[list[int], dict[Path, str]]:
    """The newest `count` undamaged steps up to `step`; the damaged ones passed over, with reasons.

    `trees` names the parts to look at; None: all of them.
    """
    directory = Path(workdir) / "checkpoints"
    steps = complete_steps(directory)
    if not steps:
        raise UserError(
            f"{workdir} holds no checkpoint; train it first with "
            f"python train.py --config=... --workdir={workdir}"
        )
    if step is not None and step not in steps:
        raise UserError(
            f"{workdir} holds no checkpoint of step {step}; it has {', '.join(map(str, steps))}."
        )
    sound: list[int] = []
    damaged: dict[Path, str] = {}
    for candidate in reversed(steps if step is None else steps[: steps.index(step) + 1]):
        path = directory / str(candidate)
        if not (reason := damage(path, trees)):
            sound.append(candidate)
            if len(sound) == count:
                return sound, damaged
        elif candidate == step:
            raise UserError(f"{path} is damaged ({reason}); choose another step than {step}.")
        else:
            damaged[path] = reason
    if sound:
        raise UserError(
            f"{workdir} holds {len(sound)} usable checkpoints, too few to average {count}; ask for "
            "fewer, or train with a larger config.train.keep_checkpoints."
        )
    reasons = "; ".join(f"{path}: {reason}" for path, reason in damaged.items())
    raise UserError(
        f"{workdir} holds no undamaged checkpoint ({reasons}); bring one back from a copy, or "
        f"remove {directory} to train from the beginning."
    )


def damage(path: Path, trees: tuple[str, ...] | None) -> str:
    """Which file of the step is not what was written; "" if all are."""
    try:
        if (path / SEAL).read_bytes() != sealing(path).encode():
            return f"{MANIFEST} has changed since it was written"
        sums = read_json(path / MANIFEST)["sha256"]
    except (OSError, ValueError, LookupError):
        return f"{MANIFEST} or {SEAL} cannot be read"
    for name, digest in sums.items():
        if trees is None or "/" not in name or name.split("/")[0] in trees:
            try:
                if sha256(path / name) != digest:
                    return f"{name} has changed since it was written"
            except OSError as error:
                return f"{name}: {error.strerror}"
    return ""


def sealing(path: Path) -> str:
    """What the seal of a step says: the checksum of the file that holds all other checksums."""
    return f"{sha256(path / MANIFEST)}  {MANIFEST}\n"


def sha256(path: Path) -> str:
    """Hexadecimal, of the whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def flush(*paths: Path) -> None:
    """Returns when files and directories are on the disk itself."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def delete(path: Path) -> None:
    """Renames first: a deletion that is cut short must not leave a step that looks complete."""
    doomed = path.with_suffix(".deleted")
    path.rename(doomed)
    shutil.rmtree(doomed)
