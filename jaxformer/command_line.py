"""The flags of `train.py`, with errors that a person can act on."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from jaxformer.errors import UserError


def parse_flags(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Parses the command line into `values`, which define a flag `config`.

    Raises:
      UserError: an unknown flag or field (the nearest is named), a value of the wrong type, a word
        that is no flag, or a config file that is not there or fails.
    """
    given = _given(argv)
    if given is not None and not Path(given.partition(":")[0]).is_file():
        raise UserError(f"--config={given}: there is no such file.")
    try:
        rest = values(argv)[1:]
        # A file that failed to load says so only when it is asked for.
        _ = list(values.config or ())
    except Exception as error:
        _explain_config_file(given or "", error)
        if isinstance(error, flags.Error):
            raise UserError(" ".join(str(error).split())) from error
        if isinstance(error, AttributeError | KeyError):
            raise UserError(_unknown_field(error)) from error
        raise
    if rest:
        raise UserError(f"{rest[0]!r} is no flag; write --NAME=VALUE, such as --workdir=runs/mine.")


def load_config(config: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """The config of a file and preset, `configs/wmt.py:big`, with `--config.FIELD=VALUE` flags.

    Raises:
      UserError: as `parse_flags`.
    """
    values = flags.FlagValues()
    argv = ["", f"--config={config}", *overrides]
    config_flags.DEFINE_config_file("config", None, "", values, sys_argv=argv)
    parse_flags(argv, values)
    return values.config


def _unknown_field(error: BaseException) -> str:
    # ml_collections quotes its own message once for each exception it passes through.
    words = str(error).replace("\\n", " ").replace("\\", "").replace("\n", " ")
    field, _, hint = words.replace("'", "").replace('"', "").partition(" Did you mean ")
    near = hint.partition(" instead")[0]
    cure = f"did you mean {near!r}?" if near else "jaxformer/config.py lists all fields."
    return f"The config has no field {field!r}: {cure}"


def _explain_config_file(given: str, error: BaseException) -> None:
    """Raises a UserError where the file of --config, and not a flag, is what is wrong."""
    path, _, preset = given.partition(":")
    roots = list(_causes(error))
    if any(isinstance(root, UserError) for root in roots):
        raise next(root for root in roots if isinstance(root, UserError))
    root = roots[-1]
    words = f"{type(root).__name__}: {' '.join(str(root).split())}"
    frames = traceback.extract_tb(root.__traceback__)
    if isinstance(root, OSError) and root.filename == path:
        said = f"cannot be read: {root.strerror}."
    elif isinstance(root, SyntaxError) and root.filename == path:
        said = f"is no Python at line {root.lineno}: {root.msg}."
    elif lines := [frame.lineno for frame in frames if frame.filename == path]:
        said = f"fails at line {lines[-1]} ({words})."
    elif "get_config() takes 0 positional arguments" in str(root):
        said = f"has no presets; leave out :{preset}."
    elif "get_config() missing" in str(root):
        said = "needs a preset; write it as --config=FILE:PRESET."
    elif "has no attribute 'get_config'" in str(root):
        said = "has no function get_config; take a file of configs/, or write one like it."
    else:
        return
    raise UserError(f"--config={given} {said}") from error


def _given(argv: Sequence[str]) -> str | None:
    """The last --config of a command line."""
    given = None
    for flag, after in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = flag.lstrip("-").partition("=")
        if flag.startswith("-") and name == "config":
            given = value if equals else after
    return given


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised for, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
