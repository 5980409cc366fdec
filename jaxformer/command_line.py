"""The flags of `train.py`, with errors that a person can act on."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from jaxformer.errors import UserError


def parse_flags(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Parses the command line into `values`, which define a flag `config`.

    Raises:
      UserError: an unknown flag or field (the nearest is named), a value of the wrong type, or a
        config file that is not there or fails.
    """
    try:
        values(argv)
        # A file that failed to load says so only when it is asked for.
        _ = list(values.config or ())
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error
    except (AttributeError, KeyError) as error:
        # ml_collections quotes its own message once for each exception it passes through.
        words = str(error).replace("\\n", " ").replace("\\", "").replace("\n", " ")
        field, _, hint = words.replace("'", "").replace('"', "").partition(" Did you mean ")
        near = hint.partition(" instead")[0]
        cure = f"did you mean {near!r}?" if near else "jaxformer/config.py lists all fields."
        raise UserError(f"The config has no field {field!r}: {cure}") from error
    except OSError as error:
        raise UserError(f"--config cannot be loaded: {_root_cause(error)}") from error


def _root_cause(error: BaseException) -> str:
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return " ".join(str(error).split())
