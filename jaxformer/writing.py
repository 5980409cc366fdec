"""Files that appear whole or not at all; what the system refuses is one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from jaxformer.errors import UserError

DISK_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


@contextlib.contextmanager
def whole(path: Path, name: str = "") -> Iterator[Path]:
    """Gives the block a path to write to, which takes the place of `path` when all is written.

    What was at `path` before stays until then, and after an error.

    Raises:
      UserError: it cannot be written; it is called `name`, or by its path.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{name or path} cannot be written: {reason(error)}.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def check(path: Path, name: str = "") -> None:
    """Before the work: what cannot be written in the end should not be computed.

    Raises:
      UserError: no file can be written there; it is called `name`, or by its path.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{name or path} is not a file; name one.")
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise UserError(f"{name or path} cannot be written: {reason(error)}.") from error


@contextlib.contextmanager
def below(folder: Path, cure: str) -> Iterator[None]:
    """For a block that writes files below a folder.

    Raises:
      UserError: the system refuses; names the folder, the reason and the cure.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({reason(error)}); {cure}.") from error


def reason(error: OSError) -> str:
    """Why the system refused."""
    return error.strerror or str(error)


def disk_is_full(error: BaseException) -> bool:
    """Whether that is the reason; libraries in C++ report system errors as text only."""
    return any(words in str(error) for words in DISK_FULL)
