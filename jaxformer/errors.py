"""What a person did wrong, said so that they can put it right."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

EXIT_CODE = 2


class UserError(Exception):
    """A mistake in the input: one sentence that names the place and the cure.

    Commands print the sentence and exit with code 2; no traceback is shown. Raise it where the
    place (file, line, field) is known, never as a wrapper round an unknown failure.
    """


@contextlib.contextmanager
def plainly_said() -> Iterator[None]:
    """Ends the process with code 2 and one sentence on stderr, where a person made a mistake."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
